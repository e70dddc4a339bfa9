"""The `histodiffusion` command: each stage by itself, or all of them by `reproduce`."""

import errno
import os
import signal
import sys
import time
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, Union

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from histodiffusion import __version__
from histodiffusion.core import HistoDiffusionError, as_path, load_settings, read_json
from histodiffusion.study import profiles
from histodiffusion.study.stages import STAGES


@dataclass(frozen=True)
class RunOptions:
    "The options that describe a run; all further options are settings of its profile."

    profile: str = field(default_factory=lambda: load_settings().profile) # preset of scale: quick, small, gpu, paper or smoke
    dataset: str = "" # labelled set: folder:PATH with class/image, npz:PATH, h5:PATH, parquet:PATH, phantom:LABORATORY[:N[:SEED]], or a name; default: the profile's
    labels: str = "" # table for folder:PATH (.csv with columns file and label, patient, slide or split); none: its manifest.csv
    test: str = "" # second folder of the same classes, folder:PATH2, to test on alone; folder:PATH is then divided into training and validation
    fit: Literal["crop", "tile"] = "crop" # images of folder:PATH that are not square: their centre, or cut into squares that stay in one split
    pretrain_sets: tuple[str, ...] = () # unlabelled sets to pre-train on; none given: those that suit the target
    skip_corrupt: bool = False # name corrupt images and leave them out, instead of stopping
    allow_leakage: bool = False # go on though pre-training sets repeat test patches of the target
    skip_leaks: bool = False # leave pre-training images that repeat test or validation patches out of the pool
    data: OmitArgPrefixes[profiles.DataSettings] = profiles.DataSettings()
    autoencoder: OmitArgPrefixes[profiles.AutoencoderSettings] = profiles.AutoencoderSettings()
    prior: OmitArgPrefixes[profiles.PriorSettings] = profiles.PriorSettings()
    adaptation: OmitArgPrefixes[profiles.AdaptationSettings] = profiles.AdaptationSettings()
    sampling: OmitArgPrefixes[profiles.SamplingSettings] = profiles.SamplingSettings()
    classifiers: OmitArgPrefixes[profiles.BackboneSettings] = profiles.BackboneSettings()
    baselines: OmitArgPrefixes[profiles.BaselineSettings] = profiles.BaselineSettings()
    ablations: OmitArgPrefixes[profiles.AblationSettings] = profiles.AblationSettings()
    typed: tyro.conf.Suppress[tuple[str, ...]] = () # settings that were typed, also where the preset has the same value

    def make(self):
        "The run that the options describe."
        from histodiffusion.study.run import Run

        preset = profiles.get_profile(self.profile).settings()
        sections = [getattr(self, name) for name in section_names()]
        values = {f.name: getattr(s, f.name) for s in sections for f in fields(s)}
        run = Run(self.profile, self.full_dataset(), self.pretrain_sets or None, skip_corrupt=self.skip_corrupt,
                  overrides={k: v for k, v in values.items() if k in self.typed or v != preset[k]},
                  allow_leakage=self.allow_leakage, skip_leaks=self.skip_leaks)  # fmt: skip
        return run.with_seed(run.settings.seeds[0])

    def full_dataset(self) -> str:
        "The name of the labelled set, with its table and its test folder."
        given = dict(labels=self.labels, test=self.test, fit="tile" if self.fit == "tile" else "")
        for option, what in dict(labels="a table", test="a folder to test on", fit="how images are cut").items():
            if given[option] and not self.dataset.startswith("folder:"):
                raise HistoDiffusionError(f"--{option} names {what} for a folder, and --dataset is '{self.dataset}': give "
                                          "--dataset folder:PATH.")  # fmt: skip
        if self.test.startswith(("npz:", "h5:", "parquet:", "phantom:")):
            raise HistoDiffusionError(f"--test is '{self.test}', and only folders can be test sets: give folder:PATH.")
        return self.dataset + "".join(f",{name}={value}" for name, value in given.items() if value)


def section_names() -> list[str]:
    "The options of a run that are sections of settings."
    return [f.name for f in fields(RunOptions) if isinstance(f.default, tuple(profiles.SECTIONS))]


@dataclass(frozen=True)
class StageCommand(RunOptions):
    "Make the stages of a command, and those before them that are missing; finished ones are kept."

    name: tyro.conf.Suppress[str] = "" # of the command
    dry_run: bool = False # only list what would be made
    force: bool = False # make the stages of this command anew, and all that follow

    def __call__(self):
        from histodiffusion.app.reproduce import describe_plan

        run = self.make()
        if self.dry_run:
            print(describe_plan(run, stages_of(self.name)))
        else:
            make_stages(run, self.name, self.force)
        return 0


@dataclass(frozen=True)
class Reproduce(StageCommand):
    "Make every table and figure, and every stage they need, by executing the notebooks."

    cores: int = 0 # processor cores to use; 0: all

    def __call__(self):
        from histodiffusion.app.reproduce import reproduce

        if not 0 <= self.cores <= 4096:
            raise HistoDiffusionError(f"--cores is {str(self.cores)[:30]}: give a whole number from 0 to 4096.")
        return reproduce(self.make(), self.cores or None, self.dry_run, self.force)


@dataclass(frozen=True)
class Data(StageCommand):
    "Show the labelled set with its splits; list, fetch, verify, describe or audit data sets."

    action: Positional[Literal["show", "list", "fetch", "verify", "describe", "audit"]] = "show" # list: known names; describe: licence, source
    names: Positional[tuple[str, ...]] = () # the set to fetch, verify or describe; the sets to audit, or 'mirror'
    accept_licence: bool = False # fetch without the question that is asked at a terminal

    def __call__(self):
        from histodiffusion.app.data_command import ACTIONS

        if self.action in ("show", "list") and self.names:
            raise HistoDiffusionError(f"'data {self.action}' takes no NAME ({self.names[0]}): give the labelled set by "
                                      "--dataset, or use 'data audit SET ...'.")  # fmt: skip
        if self.action != "show" or not self.dry_run:
            ACTIONS[self.action](self)
        return StageCommand.__call__(self) if self.action == "show" else 0


STAGE_COMMANDS = {
    "pretrain": "Train autoencoder and diffusion prior on unlabelled patches.",
    "adapt": "Fine-tune the prior and train the latent classifier on the few labelled patches.",
    "synthesize": "Sample patches class by class with classifier guidance.",
    "select": "Keep the synthetic patches that match their target class.",
    "augment": "Train the backbone on real and synthetic patches, and measure it on test patches.",
    "baselines": "Train the baselines, and measure the patches of all methods.",
    "evaluate": "Put all seeds together: tables, figures and safety checks.",
    "ablate": "Vary each choice by itself, and measure its effect.",
}


@dataclass(frozen=True)
class Export(RunOptions):
    "Write the synthetic patches of a run as a folder to share, with table, card and Croissant metadata."

    out: str = "synthetic" # a new folder; for several seeds, one below it for each
    all: bool = False # not only the patches that the selection kept
    keep: tuple[str, ...] = () # NAME=N ...: how many selected patches of these classes, 0 to 100000; --per-class is how many were drawn
    with_real: bool = False # the real patches too, in train, validation and test

    def __call__(self):
        from histodiffusion.app.share import export_synthetic, export_with_real

        if self.all and (self.keep or self.with_real):
            raise HistoDiffusionError("--all exports patches that were not selected, without real ones: leave --keep and "
                                      "--with-real out, or --all.")  # fmt: skip
        run = self.make()
        for seed in run.settings.seeds:
            folder = self.out if len(run.settings.seeds) == 1 else os.path.join(self.out, f"seed-{seed}")
            if self.with_real:
                print(export_with_real(run.with_seed(seed), folder, keep=self.keep))
            else:
                print(export_synthetic(run.with_seed(seed), folder, selected=not self.all, keep=self.keep))
        return 0


@dataclass(frozen=True)
class Push:
    "Upload a classifier, an export or a published prior with its card to the Hugging Face hub, privately."

    folder: Positional[str] # that HistoDiffusion wrote
    repo: Positional[str] # OWNER/NAME on the hub
    public: bool = False # visible for everybody

    def __call__(self):
        from histodiffusion.app.push import push_folder

        print(push_folder(self.folder, self.repo, self.public))
        return 0


@dataclass(frozen=True)
class Predict(RunOptions):
    "Name the class of every patch of a folder or slide, with the classifier that a run recommends, or another one."

    source: Positional[str] = "" # folder of patches, image, slide, folder of slides, or npz:PATH
    out: str = "predictions.csv" # a new file; a call that was stopped goes on
    model: str = "" # folder of a classifier; none: the one that the run of the further options recommends
    method: str = "" # of that run, such as 'teacher' or 'histodiffusion_selected@1'; none: the recommended one
    heat_map: bool = False # draw the class of each tile over its slide too
    as_slides: bool = False # cut ordinary images into tiles too
    mpp: float | None = None # resolution of the tiles, μm/px; none: that of the training patches, where it is known
    tile_size: int | None = None # side of the tiles, px; none: that of the training patches
    mpp_of_file: float | None = None # μm/px of slides that do not state it, 0.05 to 20
    tissue: float = 0.5 # least share of tissue in a tile, 0 to 1

    def __call__(self):
        from histodiffusion.app.predict import draw_class_maps, predict_to_csv
        from histodiffusion.core import read_table
        from histodiffusion.models.classifier import Classifier
        from histodiffusion.study.recommend import load_classifier

        if not self.source:
            raise HistoDiffusionError("Give what to name: histodiffusion predict FOLDER --model PATH.")
        classifier = Classifier.load(self.model) if self.model else load_classifier(self.make(), self.method)
        given = dict(mpp=self.mpp, size=self.tile_size, mpp_of_file=self.mpp_of_file)
        tiling = {k: v for k, v in given.items() if v is not None} | dict(tissue=self.tissue)
        start = time.time()
        out = predict_to_csv(classifier, self.source, self.out, self.skip_corrupt, self.as_slides, **tiling)
        table, seconds = read_table(out), time.time() - start
        print(f"{len(table)} patches in {seconds:.0f} s ({len(table) / seconds:.0f} a second): {out}")
        for label, n in table.label.value_counts().items():
            print(f"  {label or 'not readable'}: {n}")
        if self.heat_map:
            maps = draw_class_maps(classifier, self.source, table, out, self.as_slides, self.mpp_of_file)
            print("\n".join(map(str, maps)) or "no map: there is no slide")
        return 0


@dataclass(frozen=True)
class Tile:
    "Cut whole slides or large images into patches at one resolution, where there is tissue."

    source: Positional[str] # a slide or large image, or a folder of them
    out: str # folder for patches and manifest.csv; a second call continues
    mpp: float = 0.5 # resolution of the patches, μm/px, 0.05 to 100
    size: int = 224 # side of the patches, px, 8 to 8192
    tissue: float = 0.5 # least share of tissue in a patch, 0 to 1
    overlap: int = 0 # px that neighbours share, >= 0
    mpp_of_file: float | None = None # μm/px of the files, where they do not state it, 0.05 to 20
    max_patches: int | None = None # most patches per slide, drawn at random, > 0
    seed: int = 0 # of that draw, >= 0
    patient: str | None = None # regular expression that finds the patient in a slide's name, or in its path below the folder; none: TCGA's barcodes
    label_from: Literal["none", "folder"] = "none" # folder: slides lie in slides/CLASS/..., and the patches are labelled
    annotations: str | None = None # GeoJSON of QuPath, a file or a folder with one for each slide: patches of annotated areas, labelled
    coverage: float = 0.5 # least share of a patch that annotations of its class cover, above 0, to 1
    any_colour: bool = False # blue and green are tissue too, for trichrome or Alcian blue; and so is ink
    images: bool = False # ordinary images beside slides too, such as masks and thumbnails
    skip_corrupt: bool = False # name slides that cannot be read and go on

    def __call__(self):
        from histodiffusion.data.slides import tile_slides

        options = {f.name: getattr(self, f.name) for f in fields(self)}
        options |= dict(source=as_path(self.source), out=as_path(self.out))
        if self.annotations:
            options |= dict(annotations=as_path(self.annotations))
        if self.patient is None: # then the default of the tiling, not 'unknown'
            options.pop("patient")
        manifest = tile_slides(options.pop("source"), options.pop("out"), **options)
        print(f"{len(manifest)} patches of {manifest.slide.nunique()} slide(s) in {self.out}")
        if "label" in manifest:
            counts = ", ".join(f"{c or 'no class'} {n}" for c, n in manifest.label.value_counts().sort_index().items())
            print(f"classes: {counts}; as labelled set: --dataset folder:{self.out}")
        print(f"to pre-train on them: --pretrain-sets folder:{self.out}")
        return 0


@dataclass(frozen=True)
class Settings:
    "List every setting with its comment and its value in each profile."

    def __call__(self):
        from fastcore.docments import docments

        values = {name: p.settings() for name, p in profiles.PROFILES.items()}
        text = lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else str(v) or "-"  # noqa: E731
        for section in profiles.SECTIONS:
            print(f"\n{section.__doc__}")
            for name, comment in docments(section, returns=False).items():
                print(f"  --{name.replace('_', '-')}  {comment}")
                print("      " + "   ".join(f"{profile}: {text(v[name])}" for profile, v in values.items()))
        return 0


@dataclass(frozen=True)
class Encoders:
    "List known encoders: licence, size, access, and what they were trained on."

    def __call__(self):
        from histodiffusion.data.encoder_catalogue import encoder_table

        for e in encoder_table().itertuples():
            access = "terms to accept" if e.gated.startswith("yes") else "open"
            print(f"{e.name:<20} {e.network}\n{'':<20} licence: {e.licence}; {e.million_parameters} million parameters; "
                  f"{access}{'?' * e.gated.endswith('?')}\n{'':<20} trained on {e.trained_on}"
                  + f"; refused for targets of {e.labels_of}" * bool(e.labels_of))  # fmt: skip
        print("?: not checked at the publisher. Any other network of timm: timm:NAME, hf-hub:OWNER/NAME, local-dir:PATH or\n"
              "file:PATH.safetensors,model=NAME, as --encoder, --backbone, --teacher or --oracle")  # fmt: skip
        return 0


COMMANDS = {  # name -> its class and description
    "reproduce": (Reproduce, Reproduce.__doc__), "data": (Data, Data.__doc__),
    **{name: (StageCommand, text) for name, text in STAGE_COMMANDS.items()},
    "export": (Export, Export.__doc__), "push": (Push, Push.__doc__), "predict": (Predict, Predict.__doc__),
    "tile": (Tile, Tile.__doc__),
    "settings": (Settings, Settings.__doc__), "encoders": (Encoders, Encoders.__doc__),
}  # fmt: skip


def stages_of(command: str) -> list[str]:
    "The stages that a command makes."
    return [s.name for s in STAGES.values() if s.command == command or command == "reproduce"]


def explain(command: str) -> str:
    "What the stages of a command do, read and write."
    if command == "reproduce":
        return "\n\n--dry-run lists the stages. The other commands make some of them each."
    text = []
    for stage in map(STAGES.get, stages_of(command)):
        reads = ", ".join(stage.upstream) or f"the {stage.data} data"
        where = f"artefacts/{stage.name}-<key>" if stage.folder == "artefacts" else f"{stage.folder}/<profile>/<data set>"
        text.append(f"{stage.name}{', for each seed' if stage.per_seed else ''}: {stage.what}; reads {reads}; "
                    f"writes {stage.writes or ', '.join(stage.outputs)}, in {where}.")  # fmt: skip
    head = "Stages (missing ones before them are made first, finished ones are kept):"
    return "\n\n" + "\n\n".join([head, *text]) if text else ""


def make_stages(run, command: str, force: bool) -> None:
    "Make the stages of a command, and those that they need."
    from histodiffusion.app.reproduce import duration, plan
    from histodiffusion.study.artefacts import check_leakage, make_stage, remove_stage
    from histodiffusion.study.checks import check_run, network_notes
    from histodiffusion.study.run import Run

    names = stages_of(command)
    for warning in check_run(run):
        print(f"warning: {warning}", flush=True)
    for note in network_notes(run):
        print(f"note: {note}", flush=True)
    check_leakage(run)
    for name in names if force else ():
        for seed in run.settings.seeds if STAGES[name].per_seed else (run.seed,):
            remove_stage(run.with_seed(seed), name)
    for job in plan(run, names):
        this = Run(**job.parameters)
        title = f"[{job.position}] {STAGES[job.stage].what}" + (f", seed {this.seed}" if STAGES[job.stage].per_seed else "")
        if not this.done(job.stage):
            print(title, flush=True)
            make_stage(this, job.stage)
        seconds = duration(read_json(this.record(job.stage))["seconds"])
        print(f"{title}: {'done before' if job.done else 'done'} in {seconds}\n    {this.read(job.stage)}")


def parse(argv: list[str]):
    "The command that the words name; the defaults in its help are those of the profile."
    profile = next((b for a, b in zip(argv, argv[1:]) if a == "--profile"), None)
    profile = next((a.partition("=")[2] for a in argv if a.startswith("--profile=")), profile)
    preset = profiles.get_profile(profile or load_settings().profile)  # refuses an unknown one
    pick = lambda section: section(**{f.name: getattr(preset, f.name) for f in fields(section)})  # noqa: E731
    defaults = dict(zip(section_names(), map(pick, profiles.SECTIONS)), profile=preset.name, dataset=preset.dataset)
    defaults["typed"] = tuple(word.partition("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--"))

    def subcommand(name, c, text):
        if name in argv[:1]: # the list of commands stays short
            text += explain(name)
        known = defaults | ({"name": name} if issubclass(c, StageCommand) else {})
        run = {"default": c(**known)} if issubclass(c, RunOptions) else {}
        return Annotated[c, tyro.conf.subcommand(name, description=text, **run)]

    commands = Union[tuple(subcommand(name, *c) for name, c in COMMANDS.items())]  # noqa: UP007
    about = f"Latent diffusion for few-label histology classification, version {__version__}."
    return tyro.cli(commands, args=argv, prog="histodiffusion", description=about, config=(tyro.conf.FlagCreatePairsOff,))


REMEDIES = {  # of what the system refuses
    errno.ENOENT: "check the path", errno.ENOTDIR: "check the path", errno.ENAMETOOLONG: "choose a shorter path",
    errno.EISDIR: "check the path", errno.EACCES: "check that it may be read and written",
    errno.EPERM: "check that it may be read and written", errno.EROFS: "choose a folder that can be written",
    errno.ENOSPC: "free some space, and give the same command again",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    "Run a command; exit codes: 0 done, 1 failed, 2 something that the user can correct, 130 interrupted."
    if argv is None:  # a cluster ends jobs with SIGTERM
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show μ, or a name that is no text
            stream.reconfigure(errors="backslashreplace")
    if argv == ["--version"]:
        print(f"histodiffusion {__version__}")
        return 0
    try:
        return parse(argv)()
    except HistoDiffusionError as e:
        from histodiffusion.app.reproduce import as_typed

        print(f"histodiffusion: {as_typed(e)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # such as `histodiffusion data list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        where, remedy = f" {e.filename}" if e.filename else "", REMEDIES.get(e.errno, "check it, and try again")
        print(f"histodiffusion: {' '.join(str(e.strerror or e).split())}{where}: {remedy}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nhistodiffusion: interrupted; the same command continues from the last checkpoint.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
