"""Shards of images without embeddings, as an Apache Beam pipeline."""

import functools
import shlex

from imagen_jax.errors import UserError
from imagen_jax.preparing.job import Job, open_job, write_shard
from imagen_jax.preparing.settings import Settings


def write_shards(settings: Settings, numbers: list[int]) -> None:
    """Writes shards of a job of images; each is an element of the pipeline.

    The workers open the job themselves, so its source and its folder lie where all of
    them see it. A shard that is tried twice is written twice, with the same bytes.

    Raises:
      UserError: when Beam is not installed or knows no such runner.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            "--runner needs Apache Beam: pip install 'imagen-jax[prepare]'"
        ) from None
    words = shlex.split(settings.runner_options)
    try:
        pipeline = beam.Pipeline(
            settings.runner, PipelineOptions(words, save_main_session=False)
        )
    except ValueError as error:
        brief = str(error).splitlines()[0]
        raise UserError(f"--runner is {settings.runner!r}: {brief}") from None
    with pipeline:
        # Without a reshuffle Beam would fuse the list into one bundle.
        (
            pipeline
            | "shards" >> beam.Create(numbers)
            | "spread" >> beam.Reshuffle()
            | "write" >> beam.Map(_write, settings)
        )


def _write(number: int, settings: Settings) -> int:
    job = _job(settings)
    if not job.report(number):
        write_shard(job, number)
    return number


@functools.cache
def _job(settings: Settings) -> Job:
    return open_job(settings)
