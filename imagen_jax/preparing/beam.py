"""Shards of pictures written by Apache Beam, one element each."""

import functools
import shlex

from imagen_jax.errors import UserError
from imagen_jax.preparing.job import Job, open_source, write_shard
from imagen_jax.preparing.settings import Settings


def write_shards_with_beam(job: Job) -> None:
    """Writes the unfinished shards of a job of pictures as an Apache Beam pipeline.

    The workers open the source anew.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            "--runner needs Apache Beam: pip install 'imagen-jax[prepare]'"
        ) from None
    settings = job.settings
    words = shlex.split(settings.runner_options)
    try:
        options = PipelineOptions(words, save_main_session=False)
        pipeline = beam.Pipeline(settings.runner, options)
    except ValueError as error:
        raise UserError(f"--runner is {settings.runner!r}: {error}") from None
    todo = [n for n in range(job.source.shards) if not job.report(n)]
    with pipeline:
        # Without a reshuffle Beam would fuse the list into one bundle.
        (
            pipeline
            | beam.Create(todo)
            | beam.Reshuffle()
            | beam.Map(_write_numbered, settings)
        )


def _write_numbered(number: int, settings: Settings) -> None:
    write_shard(_job(settings), number)


@functools.cache
def _job(settings: Settings) -> Job:
    return Job(settings, open_source(settings), embedder=None)
