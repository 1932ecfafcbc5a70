"""What people see while a cache is made, and the report at the end."""

from pathlib import Path
from types import TracebackType
from typing import Any

from erw.data.cache import Cache


class Bar:
    """A progress bar with rate and time left, on standard error."""

    def __init__(self, title: str, *, total: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.encoded = 0
        self._title = title
        self._console = Console(stderr=True, quiet=not shown)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not shown,
        )
        self._task = self._progress.add_task(title, total=total, rate="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def skip(self, images: int) -> None:
        """Images of shards that were there already."""
        task = self._progress.tasks[0]
        # They took no time: without this the rate, and so the time left, would be far off.
        self._progress.update(self._task, total=(task.total or 0) - images)

    def advance(self, images: int) -> None:
        """Images that were encoded or rejected now."""
        self.encoded += images
        speed = self._progress.tasks[0].speed
        rate = f"{speed:.0f} images/s" if speed else ""
        self._progress.update(self._task, advance=images, rate=rate)

    def waiting(self, shards: int) -> None:
        """Own shards are done, others' are not."""
        self._progress.update(
            self._task, description=f"{self._title}: waiting for {shards} shards of other processes"
        )

    def note(self, text: str) -> None:
        """One line beside the bar."""
        self._console.print(text, highlight=False, markup=False)

    def say(self, report: dict[str, Any], rejected: Path) -> None:
        """Print the report."""
        megabytes = report["bytes"] / 1e6
        print_ = self._console.print
        print_(
            f"{report['rows']} images in {report['seconds']:.0f} s "
            f"({report['images_per_second']:.0f} images/s), {megabytes:.1f} MB, "
            f"{report['bytes_per_row']:.0f} bytes a row",
            highlight=False,
        )
        for name, value in report["fidelity"].items():
            print_(
                f"features of {name} ({report['formats'][name]}): cosine with the originals "
                f"{value['mean']:.6f} on average, {value['min']:.6f} at worst",
                highlight=False,
            )
        for name, told in report["pca"].items():
            print_(
                f"features of {name} are their first {told['kept']} of {told['of']} principal "
                f"components, which keep {told['variance']:.2%} of the variance",
                highlight=False,
            )
        if report["sources"] > 1:
            print_(f"{report['sources']} sources, {report['classes']} classes", highlight=False)
        if report["rejected"]:
            print_(f"{report['rejected']} images rejected, reasons in {rejected}", highlight=False)


def summary(cache: Cache, *, seconds: float, encoded: int) -> dict[str, Any]:
    """Counts, time, bytes, what was rejected, and how faithful stored features are."""
    manifest = cache.manifest
    settings = manifest.settings
    size = sum(file.bytes for file in manifest.files)
    pca = {
        e["name"]: e["pca"] | manifest.pca[e["name"]] for e in settings["encoders"] if "pca" in e
    }
    return {
        "rows": manifest.rows,
        "rejected": manifest.rejected,
        "encoded_now": encoded,
        "seconds": seconds,
        "images_per_second": encoded / max(seconds, 1e-9),
        "bytes": size,
        "bytes_per_row": size / manifest.rows,
        "formats": {name: spec.format for name, spec in cache.features.items()},
        "fidelity": manifest.fidelity,
        "pca": pca,
        "sources": 1 + len(settings.get("appended", [])),
        "classes": len(manifest.class_names),
    }
