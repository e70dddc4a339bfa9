# One rule for each notebook of a run's plan. `histodiffusion reproduce` starts it; by hand:
#   snakemake --cores 2 --rerun-triggers mtime params --config profile=smoke dataset=phantom:target
# A stage's folder is named by a hash of everything that it depends on, so a changed parameter makes new targets.

from histodiffusion.app.reproduce import job_command, plan_from_config
from histodiffusion.study.stages import RESULTS, upstream_of

JOBS = plan_from_config(config)
COMMAND = job_command(config)
FIRST = upstream_of("table_1") # answers before ablations


rule all:
    input:
        [output for job in JOBS if job.stage in RESULTS for output in job.outputs],


for job in JOBS:

    rule:
        name:
            job.name
        input:
            list(job.inputs),
        output:
            list(job.outputs),
        log:
            job.executed,
        params:
            key=job.key,
        priority: 2 if job.stage in FIRST else int(job.stage == "ablation_pretraining") # the longest of the last ones
        threads: max(1, (workflow.cores or 1)//job.share) if job.share else 1
        shell:
            "OMP_NUM_THREADS={threads} {COMMAND} {rule}"
