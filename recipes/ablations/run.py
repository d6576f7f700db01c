"""Train ablations one after the other, and ask every fuser the same held-out rows.

    python recipes/ablations/run.py --data-dir DATA --out runs/ablations [NAME …]

Without names all recipes of this folder are run, the base first. What is finished is skipped, what was interrupted goes
on. Each recipe gets one line in results.jsonl, all of them together a table in results.md.

Held out are the dev splits of the three sets that are trained on, of which 220 rows choose each fuser's best step, and
MMLU-Redux, of which nothing is. Accuracy is that of the likeliest letter; nats are −log p of the right letter among the
valid ones, with the sharer's cache of the row (matched), of another row (mismatched) and with its mean features (zeroed).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from cache2cache.errors import DataError, TrainingError
from cache2cache.evaluate import folder, stats
from cache2cache.evaluate.evaluation import evaluate
from cache2cache.evaluate.questions import LETTERS
from cache2cache.evaluate.report.numbers import Scale
from cache2cache.evaluate.rowfile import read_records
from cache2cache.evaluate.schema import Estimate, RowRecord
from cache2cache.evaluate.settings import Machine as EvaluationMachine
from cache2cache.evaluate.settings import Settings
from cache2cache.fuser.store import CONFIG, read_config
from cache2cache.train.checkpoints import FUSER, RECIPE
from cache2cache.train.config import Machine, Recipe
from cache2cache.train.recipes import differences, read_recipe
from cache2cache.train.run import train

FOLDER = Path(__file__).parent
BASE = "base"
ASKED = "held-out"
TRAINED_ON = ("arc_easy", "arc_challenge", "openbookqa")
UNSEEN = "mmlu_redux"
SYSTEMS = {"matched": "c2c", "mismatched": "mismatched", "zeroed": "zeroed"}

Key = tuple[str, str]
"""Task and row."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="recipes of this folder; all by default")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--features", type=Path, help="folder of prefills; OUT/features by default")
    parser.add_argument("--rows", type=int, default=150, help="held-out rows of each task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as for c2c train, of each recipe"
    )
    args = parser.parse_args()

    recipes = {name: read_recipe(FOLDER / f"{name}.toml", args.set) for name in args.names or names()}
    features = args.features or args.out / "features"
    failed = {}
    for name, recipe in recipes.items():
        try:
            run(recipe, args.out / name, args.data_dir, features, args.rows, args.device)
        except TrainingError as error:  # a run that explodes is a result, and the others do not depend on it
            failed[name] = error
    write(args.out, args.rows)
    for name, error in failed.items():
        print(f"{name} was not trained: {error}", file=sys.stderr)
    sys.exit(bool(failed))


def run(recipe: Recipe, out: Path, data_dir: Path, features: Path, rows: int, device: str) -> None:
    """Whatever is left to do of one recipe."""
    if not trained(recipe, out):
        train(recipe, out, Machine(data_dir, features, device), resume=True)
    if not asked(out, rows):
        machine = EvaluationMachine(device, data_dir=data_dir, prefills=features, max_errors=0.0)
        evaluate(
            settings(recipe, out, data_dir, rows), out / ASKED, machine, command=f"run.py {out.name} --rows {rows}"
        )


def names() -> list[str]:
    """All recipes of this folder, the base first."""
    return sorted((path.stem for path in FOLDER.glob("*.toml")), key=lambda name: (name != BASE, name))


def trained(recipe: Recipe, out: Path) -> bool:
    """Whether the recipe's fuser is there.

    Raises:
        DataError: the folder holds the fuser of another recipe.
    """
    if not (out / FUSER / CONFIG).is_file():
        return False
    was = Recipe.model_validate_json((out / RECIPE).read_text(encoding="utf-8"))
    if changes := differences(was, recipe):
        raise DataError(f"{out} was trained with another recipe", got="; ".join(changes), hint=f"Delete {out}")
    return True


def asked(out: Path, rows: int) -> bool:
    """Whether a fuser has answered so many rows of each task."""
    report = out / ASKED / "report.json"
    return report.is_file() and json.loads(report.read_text(encoding="utf-8"))["run"]["limit"] == rows


def settings(recipe: Recipe, out: Path, data_dir: Path, rows: int) -> Settings:
    """What a fuser is asked: the same rows whatever the recipe."""
    held_out = out.parent / ASKED
    held_out.mkdir(parents=True, exist_ok=True)
    for name in TRAINED_ON:  # tasks are called as their files, and all of these are called dev
        shutil.copyfile(data_dir / name / "dev.jsonl.zst", held_out / f"{name}_dev.jsonl.zst")
    return Settings(
        receiver=recipe.receiver,
        sharers=(recipe.sharer,),
        fusers=(str(out / FUSER),),
        dtype=recipe.dtype,
        tasks=(*(str(held_out / f"{name}_dev.jsonl.zst") for name in TRAINED_ON), UNSEEN),
        systems="c2c",
        controls="mismatched,zeroed",
        limit=rows,
        answer_tokens=1,
        receiver_form="chat",
        sharer_form="chat",
        latency_rows=0,
    )


def write(out: Path, rows: int) -> None:
    """results.jsonl and results.md, of every fuser in the folder that has answered so many rows."""
    done = [name for name in names() if asked(out / name, rows)]
    base = read(out / BASE) if BASE in done else {}
    lines = [result(name, out / name, base) for name in done]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (out / "results.jsonl").write_text(text, encoding="utf-8")
    (out / "results.md").write_text(table(lines), encoding="utf-8")


def read(out: Path) -> dict[str, dict[Key, RowRecord]]:
    """matched, mismatched, zeroed → the answers of one fuser."""
    records = read_records(out / ASKED / folder.ROWS, RowRecord)
    return {
        name: {(row.task, row.id): row for row in records if row.system == system} for name, system in SYSTEMS.items()
    }


def result(name: str, out: Path, base: dict[str, dict[Key, RowRecord]]) -> dict[str, Any]:
    """One line of results.jsonl."""
    answers, config = read(out), read_config(out / FUSER / CONFIG)
    report = json.loads((out / ASKED / "report.json").read_text(encoding="utf-8"))
    parts = {
        "all": lambda key: True,
        "trained on": lambda key: key[0] != UNSEEN,
        "unseen": lambda key: key[0] == UNSEEN,
    }
    return {
        "recipe": name,
        "parameters": report["run"]["fuser_parameters"][0],
        "training": config.training,
        "rows": {part: measured(answers, base, chosen) for part, chosen in parts.items()},
    }


def measured(answers, base, chosen) -> dict[str, Any]:
    """Estimates over the rows of some tasks; differences are paired, more is better in all of them."""
    keys = sorted(key for key in answers["matched"] if chosen(key))
    nats = {name: [_nats(rows[key]) for key in keys] for name, rows in answers.items()}
    right = {name: [_right(rows[key]) for key in keys] for name, rows in answers.items()}
    found = {
        "accuracy": {name: stats.wilson(x) for name, x in right.items()},
        "nats": {name: stats.mean(x) for name, x in nats.items()},
        "accuracy gained": {name: stats.paired(right["matched"], x, (0, 1)) for name, x in right.items() if name != "matched"},
        "nats gained": {name: stats.paired(x, nats["matched"]) for name, x in nats.items() if name != "matched"},
    }  # fmt: skip
    if base:
        same = base["matched"]
        found["accuracy gained"][BASE] = stats.paired(right["matched"], [_right(same[key]) for key in keys], (0, 1))
        found["nats gained"][BASE] = stats.paired([_nats(same[key]) for key in keys], nats["matched"])
    return {kind: {name: x.model_dump() for name, x in estimates.items()} for kind, estimates in found.items()}


def _nats(row: RowRecord) -> float:
    return -row.letter_logprobs[LETTERS.index(row.target)]


def _right(row: RowRecord) -> float:
    return row.metrics["likelihood"]


def table(lines: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    share, nats = (
        Scale("accuracy", share=True, lower_is_better=False),
        Scale("nats", share=False, lower_is_better=False),
    )
    columns = {
        "accuracy, %": lambda line: share.estimate(_of(line, "all", "accuracy", "matched")),
        "unseen, %": lambda line: share.estimate(_of(line, "unseen", "accuracy", "matched")),
        "nats": lambda line: nats.estimate(_of(line, "all", "nats", "matched")),
        "mismatched − matched": lambda line: nats.difference(_of(line, "all", "nats gained", "mismatched")),
        "zeroed − matched": lambda line: nats.difference(_of(line, "all", "nats gained", "zeroed")),
        "base − this": lambda line: nats.difference(_of(line, "all", "nats gained", BASE)),
    }
    head = ["recipe", "parameters", *columns]
    rows = [[line["recipe"], f"{line['parameters']:,}", *(cell(line) for cell in columns.values())] for line in lines]
    ruled = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in ruled)


def _of(line: dict[str, Any], part: str, kind: str, name: str) -> Estimate | None:
    found = line["rows"][part][kind].get(name)
    return found and Estimate.model_validate(found)


if __name__ == "__main__":
    main()
