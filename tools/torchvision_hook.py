"""Lets torchvision be imported beside a torch build that its compiled part does not fit.

A CPU build of torch beside a CUDA build of torchvision cannot load torchvision's compiled operators, and
`import torchvision` then stops at "operator torchvision::nms does not exist", and timm and diffusers stop with it.
Declaring the two operators is enough for everything that does not call them.

    python tools/torchvision_hook.py install      # only where the import fails in this way
    python tools/torchvision_hook.py uninstall

`install` puts a copy of this file and a one-line `.pth` file into site-packages. The `.pth` file registers an import
hook when Python starts. The hook does nothing until torchvision is imported, and nothing then if the import succeeds.
This file must therefore stay self-contained, and light to import.
"""

import sys

ERROR = "operator torchvision::nms does not exist"
SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
HOOK = "histodiffusion_torchvision_hook"


def declare_operators():
    "Declare torchvision's `nms` and `qnms`; calling them still fails, importing torchvision does not."
    import torch

    for name, schema in SCHEMAS.items():
        torch.library.define(f"torchvision::{name}", schema)


class TorchvisionFinder:
    "Finds torchvision as Python would, and mends its import if, and only if, it fails with `ERROR`."

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            try:
                execute(module)
            except RuntimeError as error:
                if ERROR not in str(error):
                    raise
                declare_operators()
                for part in [m for m in sys.modules if m.startswith("torchvision.")]:
                    del sys.modules[part]
                execute(module)

        spec.loader.exec_module = exec_module
        return spec


def activate():
    "Register the finder in this interpreter, once."
    if TorchvisionFinder not in sys.meta_path:
        sys.meta_path.insert(0, TorchvisionFinder)


def _hook_files():
    "The module and the `.pth` file in this environment's site-packages."
    import sysconfig
    from pathlib import Path

    site = Path(sysconfig.get_path("purelib"))
    return site / f"{HOOK}.py", site / f"{HOOK}.pth"


def _import_error():
    "What a fresh interpreter of this environment reports on `import torchvision`; empty if all is well."
    import subprocess

    site = _hook_files()[0].parent
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, cwd=site)
    return "" if done.returncode == 0 else done.stderr.strip()


def _write_module(module, source):
    "Write the hook's module and its bytecode, so that starting Python costs a fraction of a millisecond."
    import py_compile

    module.write_text(source, encoding="utf-8")
    py_compile.compile(str(module), doraise=True)


def install():
    "Install the hook where torchvision needs it; returns one line that says what was done and why."
    from pathlib import Path

    module, pth = _hook_files()
    source = Path(__file__).read_text(encoding="utf-8")
    if pth.exists() and module.exists():
        if module.read_text(encoding="utf-8") != source:
            _write_module(module, source)
            return f"torchvision: import hook brought up to date in {module.parent}"
        return "torchvision: import hook is in place"
    error = _import_error()
    if not error:
        return "torchvision: imports as it is, no hook needed"
    if ERROR not in error:
        return f"torchvision: no hook installed, its import fails for another reason: {error.splitlines()[-1]}"
    _write_module(module, source)
    pth.write_text(f"import {HOOK}; {HOOK}.activate()\n", encoding="utf-8")
    return (
        f"torchvision: import hook installed in {module.parent}, because torchvision's compiled operators do not fit "
        "this torch build; `python tools/torchvision_hook.py uninstall` removes it"
    )


def uninstall():
    "Remove the hook; returns one line that says what was done."
    from importlib.util import cache_from_source
    from pathlib import Path

    module, pth = _hook_files()
    found = [f for f in (pth, module, Path(cache_from_source(str(module)))) if f.exists()]
    for file in found:
        file.unlink()
    return f"torchvision: import hook removed from {module.parent}" if found else "torchvision: no hook to remove"


def main(args=None):
    "Run `install` or `uninstall` from the command line."
    commands = {"install": install, "uninstall": uninstall}
    args = sys.argv[1:] if args is None else args
    if len(args) != 1 or args[0] not in commands:
        print("usage: python tools/torchvision_hook.py {install,uninstall}", file=sys.stderr)
        return 2
    try:
        print(commands[args[0]]())
    except OSError as error:
        print(f"torchvision: could not change the hook in site-packages: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
