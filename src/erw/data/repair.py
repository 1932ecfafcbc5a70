"""What of a finished cache is damaged, and clearing it so that it is made again."""

from pathlib import Path

from erw.data import pca
from erw.data.cache import Cache
from erw.data.claims import Claims
from erw.data.growth import sources
from erw.data.job import Job
from erw.data.manifest import MANIFEST, Manifest, Record, record_file
from erw.data.rows import Span
from erw.data.shards import hash_file
from erw.errors import CacheError


def damaged(job: Job, *, repair: bool) -> bool:
    """Rehash a finished cache; with `repair`, clear what is damaged so that it is made again."""
    bad = Cache(job.out, Manifest.read(job.out)).verify()
    if bad and not repair:
        raise named(job.out, bad)
    own = {name: span for span in job.own() for name in span.files(job.settings)}
    if repair:  # files whose record is lost cannot be joined again, whole as they may be
        bad += [name for name, span in own.items() if name not in bad and not job.done(span)]
    fitted = {
        pca.path(job.folder, i).name for i in range(len(job.settings["encoders"])) if not job.number
    }
    if others := [name for name in bad if name not in {*own, *fitted}]:
        names = ", ".join(told["name"] for told in sources(job.settings))
        raise CacheError(
            f"{job.out}: {', '.join(others[:8])} cannot be made again from {job.source.name}: "
            f"repair it with the others of its images too ({names})"
        )
    cleared = 0
    with Claims(job.folder) as claims:
        for name in bad:
            if (span := own.get(name)) is None:
                (job.folder / name).unlink(missing_ok=True)
            elif not claims.take(span.shard, span.added) or _whole(job, span):
                continue  # another process is making it again, or has, while this one was hashing
            else:
                (job.folder / record_file(span.shard, span.added)).unlink(missing_ok=True)
                claims.drop(span.shard, span.added)
                job.finished.discard(span)
            cleared += 1
    if cleared:
        (job.out / MANIFEST).unlink(missing_ok=True)
    return bool(bad)


def _whole(job: Job, span: Span) -> bool:
    """Whether a file is what its record says."""
    record = Record.read(job.folder, span.shard, span.added)
    try:
        return record is not None and all(
            hash_file(job.folder / file.file) == file.blake3 for file in record.shard.files
        )
    except OSError:
        return False


def named(out: Path | str, bad: list[str]) -> CacheError:
    """The error that names damaged files."""
    shown = ", ".join(bad[:8]) + (" ..." if len(bad) > 8 else "")
    return CacheError(f"{out}: damaged shards {shown}: make them again with --repair")
