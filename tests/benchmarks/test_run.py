import json
import subprocess
import sys

import pytest
import yaml
from scripts import BENCHMARKS, command

CASES = sorted(path.stem for path in (BENCHMARKS / "cases").glob("*.yaml"))


def peers(case):
    """The packages that a case installs for the sides which are others' work."""
    sides = yaml.safe_load((BENCHMARKS / "cases" / f"{case}.yaml").read_text())["sides"]
    return [package for side in sides.values() for package in side.get("packages", ())]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_a_case_runs_in_its_quick_form(case, tmp_path):
    for package in peers(case)[:1]:
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), package)
        if subprocess.run(pip).returncode:
            pytest.skip(f"no package index is reached that has {package}")
    out = tmp_path / "result.json"
    found = command("run", case, "--quick", "--out", out, "--environments", tmp_path)
    assert found.returncode == 0, found.stderr
    result = json.loads(out.read_text())
    first, *others = result["sides"]
    assert result["case"] == case and list(result["ratios"]) == others
    kept, tried, wanted = result["rounds kept"], len(result["rounds"]), result["settings"]["run"]["rounds"]
    assert 1 <= kept <= wanted and (kept == wanted <= tried or tried == 2 * wanted)
    assert all(side["units/s"] > 0 for side in result["sides"].values())
    # the memory of launch's sides is that of processes which they start
    assert case == "launch" or all(side["bytes above"] > 0 for side in result["sides"].values())
    if case == "launch":
        parts = {name: side["found"]["parts"] for name, side in result["sides"].items()}
        assert parts[first].keys() == parts[others[0]].keys()
        for name, of_side in parts.items():
            seconds = [value for part, value in of_side.items() if part.startswith("s ")]
            assert min(seconds) > 0 and sum(seconds) == pytest.approx(result["sides"][name]["first seconds"], rel=0.05)
    for name in others:
        ratio = result["ratios"][name]["speed"]
        assert 0 < ratio["lowest"] <= ratio["median"] <= ratio["highest"]
        assert f"{first} over {name}: {ratio['median']:.2f} times as fast" in found.stdout


def test_the_docs_say_what_each_case_compares():
    table = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    assert [case for case in CASES if f"\n| `{case}` | " not in table] == []


@pytest.mark.distributed
def test_no_memory_left_is_a_result_of_a_side(tmp_path):
    """All pairs of 8,192 rows take a quarter of a GiB, beside as much that torch takes; blocks of them a tenth of that."""
    out, settings = tmp_path / "result.json", ("work.batch=8192", "work.width=4", "run.memory_gib=0.45", "run.rounds=1")
    sides = ("plain torch", "ours")
    found = command("run", "infonce", "--quick", "--set", *settings, "--sides", *sides, "--out", out)
    assert found.returncode == 0, found.stderr
    result = json.loads(out.read_text())
    assert list(result["sides"]) == ["ours", "plain torch"]
    assert "can't allocate memory" in result["sides"]["plain torch"]["out of memory"]
    assert result["sides"]["ours"]["units/s"] > 0 and result["ratios"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("uauc", "--set", "work.row=3"), "uauc has no setting 'work.row': it has work.rows, work.users, run.rounds"),
        (("uauc", "--set", "work.rows=many"), "work.rows is 200000 by default, and can't be 'many'"),
        (("uauc", "--set", "work.rows"), "--set work.rows: give it as section.name=value"),
        (("uauc", "--set", "run.rounds=0"), "run.rounds, run.threads and run.memory_gib must be above 0"),
        (("uauc", "--device", "cuda"), "uauc runs on the CPU alone"),
        (
            ("uauc", "--sides", "ours", "torch"),
            "uauc has no side 'torch': it has ours, scikit-learn loop, pandas ranks",
        ),
        (("aucs",), "there is no case 'aucs': give one of adapt, "),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_run(arguments, message):
    found = command("run", *arguments)
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr.startswith("error: ") and message in found.stderr and "Traceback" not in found.stderr


def test_all_cases_are_listed():
    found = command("run", "--list")
    assert [line.split()[0] for line in found.stdout.splitlines()] == CASES


def test_a_dry_run_names_the_cells_of_a_sweep():
    found = command("sweep", "infonce", "work.batch=512,1024", "work.temperature=0.1,0.2", "--dry-run")
    assert found.stdout.splitlines() == [
        f"infonce.work.batch={batch}.work.temperature={temperature}"
        for batch in (512, 1024)
        for temperature in (0.1, 0.2)
    ]
    same = ("work.dtype=bfloat16", "same.losses=0.05")
    found = command("sweep", "adapt", *same, "work.micro_batch=4,8", "--dry-run")
    assert found.stdout.splitlines() == ["adapt.work.micro_batch=4", "adapt.work.micro_batch=8"]


def test_a_sweep_with_a_wrong_cell_is_refused():
    found = command("sweep", "infonce", "work.batch=512,small", "--dry-run")
    assert found.returncode == 2 and "work.batch is 8192 by default, and can't be 'small'" in found.stderr
    found = command("sweep", "infonce", "work.batch=512,512", "--dry-run")
    assert found.returncode == 2 and "give each value once" in found.stderr


@pytest.mark.distributed
@pytest.mark.slow
def test_a_cell_that_fails_does_not_end_a_sweep(tmp_path):
    """More lists than items: plain torch refuses that."""
    found = command(
        "sweep", "ranking", "work.k=6000,10", "--quick", "--out-dir", tmp_path
    )  # fmt: skip
    assert found.returncode == 1 and "failed: ranking.work.k=6000" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ranking.work.k=10.json"]


@pytest.mark.distributed
@pytest.mark.slow
def test_sides_that_do_not_do_the_same_are_refused(tmp_path):
    """A block's sums in float32 agree to some digits, never to all."""
    text = (BENCHMARKS / "cases" / "infonce.yaml").read_text()
    case = tmp_path / "infonce.yaml"
    case.write_text(text.replace("loss: 1.0e-5, gradient norms: 1.0e-4", "loss: 1.0e-16, gradient norms: 1.0e-16"))
    found = command("run", case, "--quick")
    assert found.returncode == 1 and "the sides don't do the same work" in found.stderr


def test_the_page_has_the_figures_of_the_results_that_stand(tmp_path):
    docs = BENCHMARKS.parent / "docs"
    page = tmp_path / "performance.md"
    page.write_text((docs / "performance.md").read_text())
    found = command("collect", "--into", page)
    assert found.returncode == 0, found.stderr
    assert page.read_text() == (docs / "performance.md").read_text()
    for image in (tmp_path / "images").iterdir():
        assert (docs / "images" / image.name).is_file()


def test_the_page_of_tables_has_the_figures_of_the_results_that_stand(tmp_path):
    page, stands = tmp_path / "collab.md", BENCHMARKS.parent / "docs" / "collab.md"
    page.write_text(stands.read_text())
    found = command("tables/collect", "--into", page)
    assert found.returncode == 0, found.stderr
    assert page.read_text() == stands.read_text()


@pytest.mark.distributed
@pytest.mark.slow
def test_results_are_collected_into_a_page(tmp_path):
    results, page = tmp_path / "results", tmp_path / "page.md"
    for arguments in (
        ("run", "infonce", "--quick", "--out", results / "infonce.json"),
        ("sweep", "infonce", "work.batch=64,128", "same.loss=0.001", "--quick", "--out-dir", results),
    ):
        found = command(*arguments)
        assert found.returncode == 0, found.stderr
    page.write_text("before\n<!-- benchmarks -->\nold\n<!-- end of benchmarks -->\nafter\n")
    found = command("collect", "--results", results, "--into", page)
    assert found.returncode == 0, found.stderr
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| plain torch; ") == 3 and "`infonce`, work.batch 128" in text
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        "benchmarks.svg",
        "benchmarks-infonce-work.batch.svg",
    }
