"""The picture half of `prepare` as an Apache Beam pipeline, for many machines."""

import functools
import shlex
from collections.abc import Callable, Hashable

from imagen_jax.errors import UserError
from imagen_jax.preparing.job import Job, write_shard


def write_shards(
    open_job: Callable[..., Job],
    arguments: tuple[Hashable, ...],
    numbers: list[int],
    runner: str,
    options: str = "",
) -> None:
    """Writes shards of a job of pictures; each is an element of the pipeline.

    The workers open the job themselves, so its source and its folder lie where all of
    them see it. A shard that is tried twice is written twice, with the same bytes.

    Args:
      open_job: a function of a module.
      arguments: its arguments.
      numbers: of the shards.
      runner: as Beam calls it: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner.
      options: of the runner, as on a command line.

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
    try:
        pipeline = beam.Pipeline(
            runner, PipelineOptions(shlex.split(options), save_main_session=False)
        )
    except ValueError as error:
        brief = str(error).splitlines()[0]
        raise UserError(f"--runner is {runner!r}: {brief}") from None
    write = functools.partial(_write, open_job=open_job, arguments=arguments)
    with pipeline:
        # Without a reshuffle Beam would fuse the list into one bundle.
        (
            pipeline
            | "shards" >> beam.Create(numbers)
            | "spread" >> beam.Reshuffle()
            | "write" >> beam.Map(write)
        )


def _write(number: int, open_job, arguments) -> int:
    job = _open(open_job, arguments)
    if not job.finished(number):
        write_shard(job, number)
    return number


@functools.cache
def _open(open_job, arguments) -> Job:
    return open_job(*arguments)
