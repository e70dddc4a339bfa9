"Fixtures that several files of tests use."

import pytest


@pytest.fixture(scope="module")
def own_places(tmp_path_factory):
    "A folder in which the tests of a file keep their results, figures and data."
    home = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("RESULTS_PATH", "FIGURES_PATH", "DATA_HOME"):
            patch.setenv(f"HISTODIFFUSION_{kind}", str(home / kind.lower()))
        patch.setenv("HISTODIFFUSION_PROGRESS", "off")
        yield home
