"""The table of faults and stages in docs/cluster.md, from what tests came to.

    make test-all ARGS="tests/end_to_end/test_faults.py tests/end_to_end/test_recovery.py tests/cluster/test_nodes.py --junitxml=faults.xml"
    .venv/bin/python tests/end_to_end/fault_grid.py faults.xml

Outcomes are kept in docs/faults.json with the commit that is checked out while this runs, so run it before anything is
committed; the grid may be run some cells at a time.
"""  # noqa: E501

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD, PAGE = ROOT / "docs/faults.json", ROOT / "docs/cluster.md"
BEGIN, END = "<!-- faults -->", "<!-- end of faults -->"
STAGES = ("collab", "adapt", "pretrain", "align", "fuse")

FAULTS = {
    "test_killed_worker": "a worker is killed",
    "test_a_worker_that_hangs_is_lost_in_the_stated_time": "a worker hangs",
    "test_a_stage_that_is_told_to_stop_leaves_a_checkpoint[15]": "SIGTERM to the job",
    "test_a_stage_that_is_told_to_stop_leaves_a_checkpoint[2]": "SIGINT to the job",
    "test_interrupted_job": "SIGINT to the job in one stage, and between workers' work in the next (collab, distil)",
    "test_killed_job_goes_on_with_more_workers": "the job is killed and submitted again with 3 workers instead of 2",
    "test_a_stage_whose_settings_change_goes_on_from_any_part": "the job is killed, then stopped, while settings change",
    "test_fault[driver_killed]": "the job is killed and submitted again",
    "test_fault[checkpoint_cut_off]": "a checkpoint is cut off while it is written (all workers are killed)",
    "test_fault[checkpoint_damaged]": "a checkpoint is damaged (after the job was killed)",
    "test_fault[storage_away]": "storage fails for a while",
    "test_fault[storage_away_for_too_long]": "storage fails for too long",
    "test_workspace_away": "the workspace is out of sight for 20 seconds, and a worker is killed meanwhile",
    "test_a_node_that_is_lost_is_waited_for": "nodes are lost, and others take their place",
    "test_a_node_that_is_about_to_be_taken_away_is_left_in_time": "a node is about to be taken away",
    "test_a_driver_that_is_killed_alone_and_submitted_again": "the driver alone is killed in a cluster, and submitted again",
    "test_nodes_that_do_not_come_back_and_a_head_that_is_lost": "nodes are lost for good, the head is lost",
    "test_trials_of_a_node_that_is_lost_come_to_their_end": "a node of a sweep's trial is lost, and another takes its place",
    "test_workers_become_more_and_fewer_with_the_nodes": "nodes join and leave: 1, 2, 3, 1 workers",
}  # fmt: skip
"""What a test does to a stage; those that name none do it to collab."""

FILES = ("tests/end_to_end/test_faults.py", "tests/end_to_end/test_recovery.py", "tests/cluster/test_nodes.py")


def cell_of(test: str) -> tuple[str, str] | None:
    """The fault and the stage of a test's name; None where it is none of the grid."""
    name, _, given = test.rstrip("]").partition("[")
    parts = given.split("-") if given else []
    stage = next((part for part in parts if part in STAGES), "collab")
    others = "-".join(part for part in parts if part not in STAGES)
    key = f"{name}[{others}]" if others else name
    return (FAULTS[key], stage) if key in FAULTS else None


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """By test, what a JUnit report says of it."""
    commit, changes = (
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for command in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = case.attrib["name"]
        kinds = {child.tag for child in case}
        if cell_of(name) is None or "skipped" in kinds:
            continue
        found[name] = {
            "outcome": "failed" if kinds & {"failure", "error"} else "passed",
            "seconds": f"{float(case.attrib['time']):.0f}",
            "commit": commit + " with changes" * bool(changes),
            "date": datetime.now(UTC).date().isoformat(),
        }
    return found


def table(record: dict[str, dict[str, str]]) -> str:
    cells = {cell: found for name, found in record.items() if (cell := cell_of(name)) is not None}
    names = collected()
    missing = [name for name in names if cell_of(name) is None]
    if missing:
        raise SystemExit(f"FAULTS says nothing of {', '.join(missing)}")
    written = {cell for name in names if (cell := cell_of(name)) is not None}
    lines = ["| fault | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    for fault in FAULTS.values():
        row = []
        for stage in STAGES:
            found = cells.get((fault, stage))
            sign = {"passed": "+", "failed": "failed"}[found["outcome"]] if found else "–"
            row.append(sign if (fault, stage) in written else "")
        lines.append(f"| {fault} | " + " | ".join(row) + " |")
    by_commit: dict[str, list[dict[str, str]]] = {}
    for found in cells.values():
        by_commit.setdefault(f"commit {found['commit']}, {found['date']}", []).append(found)
    told = [
        f"{len(of)} ({sum(int(found['seconds']) for found in of) / 60:.0f} minutes) at {commit}"
        for commit, of in by_commit.items()
    ]
    lines += [
        "",
        f"Of {len(written)} cells {len(cells)} have been run: {'; '.join(told) or 'none'}. What each is of: `docs/faults.json`.",
    ]
    return "\n".join(lines)


def collected() -> list[str]:
    """Names of the grid's tests."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", *FILES]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return re.findall(r"::(\S+)$", found, re.MULTILINE)


def main(reports: list[str]) -> None:
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for report in reports:
        record |= outcomes(Path(report))
    RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")
    page = PAGE.read_text()
    head, tail = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    PAGE.write_text(f"{head}\n\n{table(record)}\n\n{tail}")


if __name__ == "__main__":
    main(sys.argv[1:])
