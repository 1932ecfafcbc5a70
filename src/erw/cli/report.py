"""`erw report`: one page of a study or of training runs."""

from erw.cli.settings import RunDirs, required


def report(runs: RunDirs, *, out: str) -> None:
    """Write one self-contained page of a study or of training runs.

    Args:
        runs: folders of training runs, or the one folder of a study.
        out: the page, such as report.html.
    """
    required(*runs)
    from erw.study.report import report as write

    print(write(runs, out=out))
