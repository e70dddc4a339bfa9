# The workflow is in the package, so that an installed library has it too. `histodiffusion reproduce` starts it; by hand:
#   snakemake --cores 2 --rerun-triggers mtime params --config profile=quick dataset=kather2016-sample

from importlib.resources import files


include: str(files("histodiffusion.app") / "Snakefile")


rule all:
    input:
        rules.results.input,
