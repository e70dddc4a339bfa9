"""The import path that the published model cards name: `from histodiffusion.sharing import load_prior`."""

# Cards of weights that were published before `histodiffusion.app.share` existed give this path, so it keeps working.
from .app.share import load_prior

__all__ = ["load_prior"]
