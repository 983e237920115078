"""python -m fastdllm doctor: is everything here, what will run how, and does a training run fit?"""

from fastdllm.cli import run
from fastdllm.demo.requirements import Finding, absent_libraries, check_libraries, read_requirements

MARKS = {"fine": "  ", "optional": " -", "wrong": "!!"}
SUBJECT_WIDTH = 24


def main(arguments: list[str]) -> None:
    """Print every finding, and exit with status 1 if something needed is wrong; options are those of a training run.

    Libraries are looked at first: all else imports them.
    """
    sections, is_complete = _check_versions()
    if not is_complete:
        _report(sections)
    if not arguments:
        _report(sections | _look_around())
    from fastdllm.demo.fit import DoctorConfig, check_run

    run(
        DoctorConfig,
        lambda config: _report(sections | _look_around() | {f"the run {config.name}": check_run(config)}),
        arguments,
    )


def _check_versions() -> tuple[dict[str, list[Finding]], bool]:
    """Return the section about libraries, and whether all that are needed are there."""
    try:
        requirements = read_requirements()
    except FileNotFoundError as error:
        return {"versions": [Finding("ranges", "unknown", str(error))]}, True
    findings = check_libraries(requirements)
    return {f"versions, against {requirements.origin}": findings}, not absent_libraries(requirements)


def _look_around() -> dict[str, list[Finding]]:
    from fastdllm.demo.machine import check_choices, check_devices, check_extras, check_storage
    from fastdllm.runtime import pick_device

    return {
        "devices": check_devices(),
        "what will be used": check_choices(pick_device()),
        "memory and disk": check_storage(),
        "for some tasks alone": check_extras(),
    }


def _report(sections: dict[str, list[Finding]]) -> None:
    """Print the sections and exit."""
    for title, findings in sections.items():
        print(f"{title}\n" + "\n".join(describe(finding) for finding in findings), flush=True)
    num_wrong = sum(finding.is_wrong for findings in sections.values() for finding in findings)
    print(f"{num_wrong} to mend (!!)" if num_wrong else "nothing needed is wrong", flush=True)
    raise SystemExit(1 if num_wrong else 0)


def describe(finding: Finding) -> str:
    """Return the finding as one line, and what to do about it on a second."""
    kind = "fine" if not finding.advice else "wrong" if finding.is_needed else "optional"
    line = f"{MARKS[kind]} {finding.subject:<{SUBJECT_WIDTH}} {finding.value}".rstrip()
    return line + (f"\n     -> {finding.advice}" if finding.advice else "")
