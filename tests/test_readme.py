"""README says what is true: its figures are those of the kept results, its commands those of CI."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "bench" / "results" / "cpu.md").read_text()


def _summary() -> list[str]:
    """The rows of the table of geometric means."""
    table = RESULTS.split("**Ratios over torch.nn beside the targets**")[1]
    return [line for line in table.splitlines() if line.startswith("|")][2:]


def test_readmes_figures_are_those_of_the_kept_results():
    rows = _summary()
    assert len(rows) == 7
    for row in rows:
        name, padded, packed, both, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        assert f"| {name} | {padded} | {packed} | {both} |" in README


def test_readme_names_the_machine_of_its_figures():
    cpu = next(line for line in RESULTS.splitlines() if line.startswith("- CPU: "))
    assert cpu.removeprefix("- CPU: ") in README


def test_readmes_two_commands_set_themselves_up_and_ci_runs_the_second():
    commands = [line for line in README.splitlines() if line.startswith("python3 ")]
    demo, tests = commands
    assert "triton_rnn demo" in demo
    assert "pytest" in tests
    for command in commands:
        assert "-m venv .venv" in command
        assert "-c constraints.txt" in command
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
