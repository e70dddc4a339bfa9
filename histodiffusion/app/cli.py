"""The `histodiffusion` command: each stage by itself, or all of them by `reproduce`."""

import argparse
import os
import signal
import sys

from histodiffusion import __version__
from histodiffusion.core import HistoDiffusionError, load_settings, read_json

COMMANDS = {
    "reproduce": "make every table and figure, and every stage they need, by executing the notebooks",
    "data": "show the labelled set, its splits and the pre-training sets; list, fetch, verify, describe or audit sets",
    "pretrain": "train autoencoder and diffusion prior on unlabelled patches",
    "adapt": "fine-tune the prior and train the latent classifier on the few labelled patches",
    "synthesize": "sample patches class by class with classifier guidance",
    "select": "keep the synthetic patches that match their class",
    "augment": "train the backbone on real + synthetic patches and measure it on test patches",
    "baselines": "train what HistoDiffusion is compared with, and measure the patches of all methods",
    "evaluate": "put all seeds together: tables, figures and the audit of the synthetic patches",
    "ablate": "try each choice by itself, and measure what it is worth",
}
NAMED = ("fetch", "verify", "describe")  # actions of `data` on one set of the registry


class Parser(argparse.ArgumentParser):
    "Says what is wrong in one sentence."

    def error(self, message):
        raise HistoDiffusionError(f"{message[:1].upper()}{message[1:]}: see '{self.prog} --help'.")


def whole_numbers(text: str) -> list[int]:
    "Read '0', '0,1' or '0,1,2'."
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of whole numbers such as 0,1,2") from None


def stage_names(command: str) -> list[str]:
    "The stages that a command stands for."
    from histodiffusion.study.stages import STAGES

    return [s.name for s in STAGES.values() if s.command == command or command == "reproduce"]


def explain(command: str) -> str:
    "What the stages of a command do, read and write."
    from histodiffusion.study.stages import STAGES

    lines = []
    for name in stage_names(command):
        stage = STAGES[name]
        where = {"artefacts": f"results/artefacts/{name}-<key>/", "results": "results/<profile>/<data set>/"}
        sets = {"pretraining": "the pre-training sets", "target": "the labelled set"}
        reads = ", ".join(stage.upstream) or sets[stage.data]
        place = where.get(stage.place, "figures/<profile>/<data set>/")
        lines += [f"{name}{', for each seed' if stage.per_seed else ''}: {stage.what}",
                  f"    reads   {reads}", f"    writes  {stage.writes}, in {place}"]  # fmt: skip
    return "\n".join(["stages (missing ones before them are made first; finished ones are kept):", *lines])


def build_parser() -> Parser:
    "The command line."
    parser = Parser(prog="histodiffusion", description="Latent diffusion for few-label histology classification.")
    parser.add_argument("--version", action="version", version=f"histodiffusion {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        p = commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.", epilog=explain(name),
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        if name == "data":
            p.add_argument("action", nargs="?", choices=["show", "list", *NAMED, "audit"], default="show", help="list: the "
                           "known names; fetch: download and check; verify: check again; describe: licence, citation, "
                           "source; audit: what sets hold, repeat and share")  # fmt: skip
            p.add_argument("sets", nargs="*", metavar="NAME", help="the set to fetch, verify or describe (see 'data "
                           "list'); the sets to audit, or 'mirror' (default: the labelled set and the pre-training sets)")  # fmt: skip
            p.add_argument("--accept-licence", "--yes", action="store_true", help="fetch without the question that is "
                           "asked at a terminal")  # fmt: skip
        add_run_options(p)
        p.add_argument("--dry-run", action="store_true", help="only say what would be made, and estimate time and disk")
        p.add_argument("--force", action="store_true", help="make this command's stages anew, and all that follows")
        if name == "reproduce":
            p.add_argument("--cores", type=int, metavar="N", help="processor cores to use (default: all)")
    add_export(commands)
    add_tile(commands)
    return parser


def add_run_options(p) -> None:
    "The options that say which run is meant."
    from histodiffusion.study.profiles import PROFILES

    presets = "; ".join(f"{name}: {preset.description}" for name, preset in PROFILES.items())
    p.add_argument("--profile", help=f"preset of scale (default: the one in settings.ini); {presets}")
    p.add_argument("--dataset", default="phantom:target", help="labelled set: phantom:LABORATORY[:N[:SEED]], "
                   "folder:PATH with class/image below, or a name (see 'data list'; default: phantom:target)")  # fmt: skip
    p.add_argument("--pretrain-sets", nargs="+", metavar="SET", help="unlabelled sets to learn from (default: "
                   "those that suit the target)")  # fmt: skip
    p.add_argument("--label-fraction", type=float, metavar="F", help="share of the training labels that is known, "
                   "0 < F <= 1 (default: the profile's)")  # fmt: skip
    p.add_argument("--seed", "--seeds", dest="seeds", nargs="+", type=whole_numbers, metavar="N",
                   help="repeats, such as 0,1,2 (default: the profile's)")  # fmt: skip
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the profile; "
                   "may be repeated, lists are written with commas")  # fmt: skip
    p.add_argument("--skip-corrupt", action="store_true", help="name corrupt images and leave them out, instead "
                   "of stopping")  # fmt: skip
    p.add_argument("--allow-leakage", action="store_true", help="go on though pre-training sets repeat test patches of "
                   "the target")  # fmt: skip
    p.add_argument("--skip-leaks", action="store_true", help="leave pre-training images that repeat test or validation "
                   "patches of the target out of the pool")  # fmt: skip


def add_export(commands) -> None:
    "The options of `export`, which reads what a run has made."
    text = "write the synthetic patches of a run as a folder to share, with table, card and Croissant metadata"
    p = commands.add_parser("export", help=text, description=f"{text[:1].upper()}{text[1:]}. The run's patches must be "
                            "there: 'histodiffusion select' with the same options makes them.")  # fmt: skip
    add_run_options(p)
    p.add_argument("--out", required=True, metavar="FOLDER", help="a new folder; one below it for each of several seeds")
    p.add_argument("--all", action="store_true", help="not only the patches that the selection kept")


def add_tile(commands) -> None:
    "The options of `tile`, which belongs to no run."
    text = "cut whole slides or large images into patches at one resolution, where there is tissue"
    p = commands.add_parser("tile", help=text, description=f"{text[:1].upper()}{text[1:]}.")
    p.add_argument("source", help="a slide or large image, or a folder of them")
    p.add_argument("--out", required=True, metavar="FOLDER", help="where patches and manifest.csv go; a second call goes on")
    p.add_argument("--mpp", type=float, default=0.5, help="resolution of the patches, μm/px (default: 0.5)")
    p.add_argument("--size", type=int, default=224, help="side of the patches, px (default: 224)")
    p.add_argument("--tissue", type=float, default=0.5, help="least share of tissue in a patch, 0..1 (default: 0.5)")
    p.add_argument("--overlap", type=int, default=0, help="px that neighbours share (default: 0)")
    p.add_argument("--mpp-of-file", type=float, metavar="MPP", help="μm/px of the files, where they do not say")
    p.add_argument("--max-patches", type=int, metavar="N", help="patches per slide at most, drawn at random")
    p.add_argument("--seed", type=int, default=0, help="of that draw (default: 0)")
    p.add_argument("--skip-corrupt", action="store_true", help="name slides that cannot be read and go on")


def tile(args) -> None:
    "Cut slides into patches."
    from histodiffusion.data.slides import tile_slides

    options = {k: getattr(args, k) for k in ("mpp", "size", "tissue", "overlap", "mpp_of_file", "max_patches", "seed")}
    manifest = tile_slides(args.source, args.out, skip_corrupt=args.skip_corrupt, **options)
    print(f"{len(manifest)} patches of {manifest.slide.nunique()} slide(s) in {args.out}")
    print(f"to learn from them: --pretrain-sets folder:{args.out}")


def export(args) -> None:
    "Write the synthetic patches of every seed of a run."
    from histodiffusion.app.share import export_synthetic

    run = make_run(args)
    for seed in run.settings.seeds:
        folder = args.out if len(run.settings.seeds) == 1 else os.path.join(args.out, f"seed-{seed}")
        print(export_synthetic(run.with_seed(seed), folder, selected=not args.all))


def make_run(args):
    "The run that the options describe."
    from histodiffusion.study.profiles import parse_override
    from histodiffusion.study.run import Run

    overrides = dict(parse_override(text) for text in args.set)
    if args.seeds:
        overrides["seeds"] = [n for numbers in args.seeds for n in numbers]
    fraction = overrides.pop("label_fraction", None) if args.label_fraction is None else args.label_fraction
    run = Run(args.profile, args.dataset, args.pretrain_sets, fraction, 0, overrides, args.skip_corrupt,
              args.allow_leakage, args.skip_leaks)  # fmt: skip
    if getattr(args, "cores", None) is not None and args.cores < 1:
        raise HistoDiffusionError(f"--cores is {args.cores}: give a whole number of 1 or more.")
    return run.with_seed(run.settings.seeds[0])


def run_stages(run, command: str, force: bool) -> None:
    "Make the stages of a command, and those that they need."
    from histodiffusion.app.reproduce import duration, make_stage, plan
    from histodiffusion.study.stages import STAGES
    from histodiffusion.study.run import Run
    from histodiffusion.study.artefacts import forget

    names = stage_names(command)
    if force:
        for name in names:
            for seed in run.settings.seeds if STAGES[name].per_seed else (run.seed,):
                forget(run.with_seed(seed), name)
    for job in plan(run, targets=names):
        this, seed = Run(**job.parameters), job.parameters["seed"]
        title = f"[{job.place}] {STAGES[job.stage].what}" + (f", seed {seed}" if STAGES[job.stage].per_seed else "")
        if not this.done(job.stage):
            print(title, flush=True)
            make_stage(this, job.stage)
        record = read_json(load_settings().root / job.outputs[0])
        print(f"{title}: {'done before' if job.done else 'done'} in {duration(record['seconds'])}")
        print(f"    {load_settings().root / job.outputs[-1]}" if job.outputs[1:] else f"    {this.folder(job.stage)}")


def list_data() -> None:
    "Print the names of all data sets."
    from histodiffusion.data.phantom import LABORATORIES
    from histodiffusion.data.catalogue import REGISTRY
    from histodiffusion.data.fetch import dataset_state

    settings = load_settings()
    for name in LABORATORIES:
        print(f"phantom:{name:<18} here     procedural tissue, nine classes, made when needed")
    for d in REGISTRY.values():
        print(f"{d.name:<26} {dataset_state(d.name):<8} {d.title}; {'labelled' if d.labelled else 'unlabelled'}; "
              f"licence: {d.licence}")  # fmt: skip
    print(f"{'folder:PATH':<26} yours    class/image below PATH when labelled, any depth otherwise")
    print(f"to fetch: 'histodiffusion data fetch NAME' puts it into {settings.data_home}; by hand: 'data describe NAME' "
          "says where from")  # fmt: skip
    print(f"mirror: {settings.data_mirror or 'none; set HISTODIFFUSION_DATA_MIRROR to the folder that holds the missing ones'}")


def named_data(args) -> None:
    "Fetch, verify or describe one set of the registry."
    from histodiffusion.data.fetch import describe_dataset, fetch_dataset, verify_dataset

    if len(args.sets) != 1:
        raise HistoDiffusionError(f"'data {args.action}' needs the NAME of one set: see 'histodiffusion data list'.")
    name = args.sets[0]
    if args.action == "describe" or args.action == "fetch" and args.dry_run:
        print(describe_dataset(name))
    elif args.action == "fetch":
        fetch_dataset(name, accept_licence=True if args.accept_licence else None)
    else:
        report = verify_dataset(name)
        for row in report.itertuples():
            print(f"{'ok ' if row.ok else 'BAD'} {row.what}: {row.found}")
        if not report.ok.all():
            raise HistoDiffusionError(f"{(~report.ok).sum()} of {len(report)} checks of '{name}' failed: see above; "
                                      "remove what is wrong and fetch it again.")  # fmt: skip


def audit_data(args) -> None:
    "Print what sets hold and repeat, and what each pair of them shares."
    from itertools import combinations

    import pandas as pd

    from histodiffusion.data.copies import audit_pair, audit_set, known_sets

    if args.sets:
        specs = known_sets("mirror" if args.sets == ["mirror"] else args.sets)
    else:
        run = make_run(args)
        specs = known_sets([run.dataset, *run.pretrain_sets])
    audits = [audit_set(spec) for spec in specs]
    columns = ["set", "images", "side", "classes", "licence", "corrupt", "exact", "near", "flat", "conflicts", "crossings"]
    print(pd.concat([a.table for a in audits])[columns].to_string(index=False))
    print("exact, near: pairs of copies; flat: nearly empty images; conflicts: copies with two labels;\n"
          "crossings: copies that a split by content alone would part, and that a run keeps together")  # fmt: skip
    for audit in audits:
        for row in audit.scan.corrupt.itertuples():
            print(f"corrupt: {row.file} ({row.reason})")
    pairs = list(combinations(specs, 2))
    rows = {(a, b): audit_pair(a, b) for a, b in pairs}
    shared = {ab: row for ab, row in rows.items() if row["exact"] + row["near"]}
    for (a, b), row in shared.items():
        print(f"{a} and {b} share images: {row['exact']} exact, {row['near']} near pairs, such as {row['example']}")
    if len(pairs) > len(shared):
        print(f"{len(pairs) - len(shared)} pairs of sets share nothing that was found")


def show_data(run) -> None:
    "Print splits, class counts and fingerprints."
    from histodiffusion.data.leakage import split_groups
    from histodiffusion.data.patches import labelled_fraction, load_patches, split_patches
    from histodiffusion.data.pool import pool_counts

    patches = load_patches(run.dataset, run.settings.image_size, run.channels, skip_corrupt=run.skip_corrupt)
    splits = split_patches(patches.keys, split_groups(run.dataset, patches.keys, patches.groups, run.settings.image_size))
    train = patches.subset(splits["train"])
    known = labelled_fraction(train.labels, train.keys, run.label_fraction, run.seed, patches.classes)
    counts = {name: patches.subset(i).counts() for name, i in splits.items()}
    counts[f"labels (seed {run.seed})"] = train.subset(known).counts()
    width = max(map(len, patches.classes)) + 2
    tone = "grey" if run.channels == 1 else "colour"
    print(f"{run.dataset}: {len(patches)} patches, {run.settings.image_size} px, {tone}, "
          f"fingerprint {run.fingerprint(run.dataset)}")  # fmt: skip
    print(" " * width + "".join(f"{name:>18}" for name in counts))
    for c in patches.classes:
        print(f"{c:<{width}}" + "".join(f"{n[c]:>18}" for n in counts.values()))
    print(f"{'all':<{width}}" + "".join(f"{sum(n.values()):>18}" for n in counts.values()))
    print("\nunlabelled patches for pre-training")
    for name, n in pool_counts(run.pretrain_sets, run.settings.pretrain_patches, run.settings.image_size).items():
        print(f"{name:<26}{n:>9}   fingerprint {run.fingerprint(name)}")


def run_command(args) -> int:
    "Do what the options ask for."
    from histodiffusion.app.reproduce import describe_plan, reproduce

    if args.command == "data" and args.action in NAMED:
        named_data(args)
        return 0
    if args.command == "data" and args.action != "audit" and args.sets:
        raise HistoDiffusionError(f"'data {args.action}' takes no NAME ({args.sets[0]}): give the labelled set by --dataset, "
                                  "or use 'data audit SET ...'.")  # fmt: skip
    if args.command == "data" and args.action == "list":
        list_data()
        return 0
    if args.command == "data" and args.action == "audit":
        audit_data(args)
        return 0
    if args.command in ("tile", "export"):
        {"tile": tile, "export": export}[args.command](args)
        return 0
    run = make_run(args)
    if args.command == "reproduce":
        return reproduce(run, cores=args.cores, dry_run=args.dry_run, force=args.force)
    if args.dry_run:
        print(describe_plan(run, targets=stage_names(args.command)))
        return 0
    if args.command == "data":
        show_data(run)
    run_stages(run, args.command, args.force)
    return 0


def main(argv: list[str] | None = None) -> int:
    "Run a command; exit codes: 0 done, 1 failed, 2 something that the user can put right, 130 interrupted."
    if argv is None:  # a cluster ends jobs with SIGTERM
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_command(build_parser().parse_args(argv))
    except HistoDiffusionError as e:
        print(f"histodiffusion: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # such as `histodiffusion data list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        where = f" {e.filename}" if e.filename else ""
        print(f"histodiffusion: {e.strerror or e}{where}: check that the folder can be written.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nhistodiffusion: interrupted; the same command goes on where this one stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
