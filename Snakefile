# The workflow is in the package, so that an installed library has it too. `histodiffusion reproduce` starts it; by hand:
#   snakemake --cores 2 --rerun-triggers mtime params --config profile=smoke dataset=phantom:target

from importlib.resources import files


include: str(files("histodiffusion.app") / "Snakefile")


rule all:
    input:
        rules.results.input,
