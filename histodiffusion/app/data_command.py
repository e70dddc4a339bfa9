"""The actions of `histodiffusion data`."""

from itertools import combinations

from histodiffusion.core import HistoDiffusionError, load_settings


def one_name(options) -> str:
    "The one data set that an action is for."
    from histodiffusion.data.patches import is_own

    if len(options.names) != 1:
        raise HistoDiffusionError(f"'data {options.action}' needs the NAME of one set: see 'histodiffusion data list'.")
    name = options.names[0]
    if is_own(name) or name.startswith("phantom:"):
        raise HistoDiffusionError(f"'data {options.action}' is for sets of the catalogue, and '{name}' needs no entry in "
                                  f"it: 'histodiffusion data audit {name}' says what it contains.")  # fmt: skip
    return name


def show(options) -> None:
    "Print splits, class counts and fingerprints of a run's data."
    from histodiffusion.data.leakage import target_splits
    from histodiffusion.data.patches import labelled_fraction, load_patches
    from histodiffusion.data.pool import pool_counts

    run = options.make()
    c, target = run.settings, run.target
    patches = load_patches(target, c.image_size, run.channels, skip_corrupt=run.skip_corrupt)
    splits = target_splits(target, patches.keys, patches.labels, patches.groups, c.image_size, patches.splits, c.folds)[1]
    if c.folds:
        splits = splits[run.seed % c.folds]
    train = patches.subset(splits["train"])
    labelled = labelled_fraction(train.labels, train.keys, c.label_fraction, run.seed, patches.classes)
    counts = {name: patches.subset(i).counts() for name, i in splits.items()}
    counts[f"labels (seed {run.seed})"] = train.subset(labelled).counts()
    tone, width = "grey" if run.channels == 1 else "colour", max(map(len, patches.classes)) + 2
    print(f"{target}: {len(patches)} patches, {c.image_size} px, {tone}, fingerprint {run.fingerprint(target)}")
    rows = {"": counts} | {k: {n: v[k] for n, v in counts.items()} for k in patches.classes}
    rows["all"] = {n: sum(v.values()) for n, v in counts.items()}
    for name, row in rows.items():
        print(f"{name:<{width}}" + "".join(f"{v if name else n:>18}" for n, v in row.items()))
    print(f"\n{grouping(target, patches, run)}")
    for note in notes(target):
        print(f"note: {note}")
    print("\nunlabelled patches for pre-training")
    for name, n in pool_counts(run.sets, c.pretrain_patches, c.image_size).items():
        print(f"{name:<26}{n:>9}   fingerprint {run.fingerprint(name)}")
    print("images of them that repeat test or validation patches stop a run, also if turned or mirrored; crops of larger "
          "images are not searched for")  # fmt: skip


def grouping(target, patches, run) -> str:
    "What the splits of a labelled set keep together."
    from histodiffusion.data.patches import dataset_layout, folder_parts

    given = "splits as the set gives them" if patches.splits else "splits made here, 60, 10 and 30 %"
    if target.startswith("folder:") and (test := folder_parts(target).test):
        given = f"tested on {test} alone"
    if folds := run.settings.folds:
        given = f"{folds} folds, each patch tested once; shown is fold {run.seed % folds}"
    if not patches.groups:
        return f"{given}; no patient or slide is known" + ", so they follow the content of each patch" * (not patches.splits)
    known = [g for g in patches.groups if g]
    rest = f", the other {len(patches) - len(known)} go by content" * (len(known) < len(patches))
    return f"{given}; {len({*known})} {dataset_layout(target).grouping} group {len(known)} patches{rest}"


def notes(target) -> list:
    "What a reader should know of the images of a set, a sentence each."
    from histodiffusion.data.patches import dataset_channels, dataset_kinds, dataset_layout, in_arrays, packed_dataset

    if target.startswith("phantom:") or in_arrays(target):
        return []
    kinds, corrupt = dataset_kinds(target), packed_dataset(target, skip_corrupt=True).corrupt
    odd, other = ("grey", "colour") if dataset_channels(target) == 3 else ("colour", "grey")
    of = f"of {sum(kinds.values())} images"
    mixed = [f"{kinds[odd]} {of}: {odd}, and made {other} like the others"] if kinds.get(odd) else []
    left = [f"{len(corrupt)} {of}: cannot be read and left out, such as {corrupt[0][0]}"] if corrupt else []
    return dataset_layout(target).notes + mixed + left


def list_sets(options) -> None:
    "Print the names of all data sets."
    from histodiffusion.data.catalogue import REGISTRY
    from histodiffusion.data.fetch import dataset_state
    from histodiffusion.data.phantom import LABORATORIES

    here = load_settings()
    for name in LABORATORIES:
        print(f"phantom:{name:<18} here     procedural tissue, nine classes, made when needed")
    for d in REGISTRY.values():
        kind = "labelled" if d.labelled else "unlabelled"
        print(f"{d.name:<26} {dataset_state(d.name):<8} {d.title}; {kind}; licence: {d.licence}")
    mirror = here.data_mirror or "none; set HISTODIFFUSION_DATA_MIRROR to the folder that has the missing ones"
    print(f"{'folder:PATH':<26} yours    class/image below PATH when labelled, any depth otherwise; --labels gives a table\n"
          f"{'npz:PATH':<26} yours    a file in MedMNIST's layout, with its splits\n"
          f"{'h5:PATH':<26} yours    a folder of pairs NAME_x.h5 and NAME_y.h5, as PatchCamelyon has them\n"
          f"{'parquet:PATH':<26} yours    Parquet files with the columns image and label (extra parquet)\n"
          f"to fetch: 'histodiffusion data fetch NAME' writes it to {here.data_home}; by hand: 'data describe NAME' "
          f"says where from\nmirror: {mirror}")  # fmt: skip


def fetch(options) -> None:
    "Download a set and check it."
    from histodiffusion.data.fetch import fetch_dataset

    if options.dry_run:
        return describe(options)
    fetch_dataset(one_name(options), accept_licence=True if options.accept_licence else None)


def describe(options) -> None:
    "Print licence, citation and source of a set."
    from histodiffusion.data.fetch import describe_dataset

    print(describe_dataset(one_name(options)))


def verify(options) -> None:
    "Check a set again."
    from histodiffusion.data.fetch import verify_dataset

    name = one_name(options)
    report = verify_dataset(name)
    for row in report.itertuples():
        print(f"{'ok ' if row.ok else 'BAD'} {row.what}: {row.found}")
    if not report.ok.all():
        raise HistoDiffusionError(f"{(~report.ok).sum()} of {len(report)} checks of '{name}' failed: see above; "
                                  "remove what is wrong and fetch it again.")  # fmt: skip


def audit(options) -> None:
    "Print what sets contain and repeat, and what each pair of them shares."
    import pandas as pd

    from histodiffusion.data.copies import audit_pair, audit_set, known_sets
    from histodiffusion.data.patches import is_own
    from histodiffusion.study.run import full_name

    run = None if options.names else options.make()
    own = [full_name(n) if is_own(n) or n.startswith("phantom:") else n for n in options.names]
    names = "mirror" if own == ["mirror"] else own or [run.target, *run.sets]
    audits = [audit_set(name) for name in known_sets(names)]
    columns = ["set", "images", "side", "classes", "licence", "corrupt", "exact", "near", "flat", "conflicts", "crossings"]
    print(pd.concat([a.table for a in audits])[columns].to_string(index=False))
    print("exact, near: pairs of copies; flat: nearly empty images; conflicts: copies with two labels;\n"
          "crossings: copies that a split by content alone would separate, and that a run keeps together")  # fmt: skip
    for found in audits:
        for row in found.scan.corrupt.itertuples():
            print(f"corrupt: {row.file} ({row.reason})")
    pairs = [audit_pair(a, b) | {"sets": f"{a} and {b}"} for a, b in combinations(known_sets(names), 2)]
    shared = [row for row in pairs if row["exact"] + row["near"]]
    for row in shared:
        print(f"{row['sets']} share images: {row['exact']} exact, {row['near']} near pairs, such as {row['example']}")
    if len(pairs) > len(shared):
        print(f"{len(pairs) - len(shared)} pairs of sets share nothing that was found: whole images are compared, in all "
              "eight positions; crops of larger images are not searched for")  # fmt: skip


ACTIONS = {"show": show, "list": list_sets, "fetch": fetch, "describe": describe, "verify": verify, "audit": audit}
