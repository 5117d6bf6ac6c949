"""A batch on Ray Data: shards are read into pieces, which go through decode, network and encode.

A piece is small, and whatever is written has a name that depends on the piece only. So a lost node costs
repeats, and a repeated piece writes the same files again.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from da3_runtime.batch.destinations import Destination
from da3_runtime.batch.pieces import Done, Piece
from da3_runtime.batch.report import Report
from da3_runtime.batch.sources import Shard, read_pieces
from da3_runtime.batch.stages import Decode, Encode, Engine, Job, Network, load
from da3_runtime.errors import DA3Error, SettingError

# Ray reserves this share of a core for each process; Pools bounds their number. All processes must fit
# on the cores that are left after nodes were lost. The stages' processes keep their shares while they
# wait for lost pieces. Without a free share, the task that reads these pieces again never starts.
_SHARE = 0.001
_REPEATS = 5  # of joining a shard whose process or node was lost
_MOST_TASKS = 1000  # that read shards; of more shards, each task reads several
_CONNECT_SECONDS = 10
_JOINS = 4  # shards that are joined at once


class Cluster(NamedTuple):
    """Nodes, cores and GPUs that a run may use."""

    nodes: int
    cores: int
    gpus: int


class Pools(NamedTuple):
    """The most processes of a run.

    Attributes
    ----------
    readers, networks : int
        That read shards, and that run the network.
    workers : int
        That decode, and as many that encode.
    """

    readers: int
    networks: int
    workers: int

    @classmethod
    def of(cls, cluster: Cluster) -> Pools:
        """The processes that use the cores and GPUs of a cluster."""
        workers = max(1, cluster.cores // 2)
        return cls(max(cluster.nodes, workers // 2), cluster.gpus or cluster.nodes, workers)


def start(address: str | None) -> Cluster:
    """Start Ray here, or connect to a cluster.

    Raises
    ------
    SettingError
        If there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    from ray.data import DataContext

    _check_reachable(address or "")
    try:
        with _quiet():
            ray.init(
                address=address or "local",
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise SettingError(f"--ray {address}: {reason}.") from None
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Each row, which is a piece, is a block, and goes on to the next stage at once.
    context.target_max_block_size = 1
    context.execution_options.verbose_progress = False
    alive = [node for node in ray.nodes() if node["Alive"]]
    sums: dict[str, float] = defaultdict(float)
    for node in alive:
        for name, amount in node["Resources"].items():
            sums[name] += amount
    return Cluster(len(alive), max(1, int(sums["CPU"])), int(sums["GPU"]))


def _check_reachable(address: str) -> None:
    """Check that a cluster listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError):
        raise SettingError(f"--ray {address}: no Ray cluster listens there.") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what Ray's C++ code writes to stderr in the body: that its log level was set."""
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def stop() -> None:
    """Stop Ray, or leave the cluster."""
    import ray

    ray.shutdown()


def probe(job: Job, cluster: Cluster) -> Engine:
    """Load the engine once where the network will run, and say which one it is.

    Raises
    ------
    DA3Error
        If it cannot be loaded.
    """
    import ray

    def find() -> Engine:
        estimator, engine = load(job.settings)
        estimator.close()
        return engine

    with _in_one_sentence():
        task = ray.remote(find).options(num_cpus=0, num_gpus=1 if cluster.gpus else 0)
        engine: Engine = ray.get(task.remote())
        return engine


def run(
    shards: Sequence[Shard],
    done: frozenset[str],
    job: Job,
    engine: Engine,
    destination: Destination,
    cluster: Cluster,
    on_piece: Callable[[Done], None],
    report: Report,
) -> None:
    """Run all shards; what was done before is left out.

    Parameters
    ----------
    done : frozenset[str]
        Ids of photos that are done.
    on_piece : Callable[[Done], None]
        Called with what became of each piece.
    report : Report
        Gets the shards that could not be read.

    Raises
    ------
    DA3Error
        If no further photo can be done.
    """
    import ray

    known = ray.put(done)
    joins = _Joins(destination, shards)
    with _in_one_sentence():
        for piece in _results(shards, known, job, engine, destination, cluster):
            if piece.ended:
                raise piece.ended
            if piece.error:
                report.shards[piece.shard] = piece.error
            for each in piece.rows:
                on_piece(each)
            joins.add(piece)
        joins.wait(0)


def _results(
    shards: Sequence[Shard],
    known: Any,
    job: Job,
    engine: Engine,
    destination: Destination,
    cluster: Cluster,
) -> Iterator[Piece]:
    import ray
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    def read(row: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
        shard: Shard = pickle.loads(row["shard"])  # noqa: S301
        photos = ray.get(known)
        try:
            for piece in read_pieces(shard, photos):
                yield piece.packed()
        except Exception as error:
            yield Piece(shard.name, 0, ended=_as_own(error)).packed()

    pools = Pools.of(cluster)
    # Ray Data spreads processes over the nodes, and repeats what was lost with one, without an end; if
    # nothing goes on for half an hour, it ends the run.
    dataset = ray.data.from_items(
        [{"shard": pickle.dumps(shard)} for shard in shards],
        override_num_blocks=min(len(shards), _MOST_TASKS),
    ).flat_map(
        read,
        compute=TaskPoolStrategy(size=pools.readers),
        num_cpus=_SHARE,
    )
    stage: Any = Stage
    dataset = dataset.map(
        stage,
        fn_constructor_args=(Decode, job),
        compute=ActorPoolStrategy(min_size=1, max_size=pools.workers),
        num_cpus=_SHARE,
    )
    dataset = dataset.map(
        stage,
        fn_constructor_args=(Network, job, engine),
        compute=ActorPoolStrategy(min_size=1, max_size=pools.networks),
        num_cpus=_SHARE,
        num_gpus=1 if cluster.gpus else None,
    )
    dataset = dataset.map(
        stage,
        fn_constructor_args=(Encode, job, engine, destination),
        compute=ActorPoolStrategy(min_size=1, max_size=pools.workers),
        num_cpus=_SHARE,
    )
    for row in dataset.iter_rows():
        yield Piece.unpacked(row)


class Stage:
    """A stage whose errors travel with the piece: Ray Data would keep only their text, in a traceback.

    Parameters
    ----------
    make : Callable[..., Any]
        Makes the stage, with the other arguments.
    """

    def __init__(self, make: Callable[..., Any], *arguments: object) -> None:
        self._run = make(*arguments)

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, bytes]:
        """The stage's result; or the piece without photos, and with the reason why the run must end."""
        try:
            packed: dict[str, bytes] = self._run(row)
        except Exception as error:
            return Piece.unpacked(row)._replace(rows=(), ended=_as_own(error)).packed()
        return packed


class _Joins:
    """Completes each shard once all of its pieces are there."""

    def __init__(self, destination: Destination, shards: Sequence[Shard]) -> None:
        import ray

        self._destination = ray.put(destination)
        self._missing: dict[str, int | None] = {shard.name: None for shard in shards}
        self._written = {shard.name: set(shard.skip) for shard in shards}
        self._running: list[Any] = []
        self._finish = ray.remote(_finish).options(num_cpus=0, max_retries=_REPEATS)

    def add(self, piece: Piece) -> None:
        """Take note of a piece; blocks if too many shards are being joined."""
        written = self._written[piece.shard]
        if piece.total is not None:
            self._missing[piece.shard] = piece.total
        elif not piece.error:
            written.add(piece.number)
        total = self._missing[piece.shard]
        if total is not None and len(written) >= total and not piece.error:
            self._running.append(self._finish.remote(self._destination, piece.shard, total))
            self.wait(_JOINS)

    def wait(self, most: int) -> None:
        """Wait until at most so many shards are being joined."""
        import ray

        while len(self._running) > most:
            ready, self._running = ray.wait(self._running)
            ray.get(ready)


def _finish(destination: Destination, shard: str, total: int) -> None:
    destination.finish(shard, total)


@contextmanager
def _in_one_sentence() -> Iterator[None]:
    """Turn the errors of Ray in the body into one sentence."""
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    try:
        yield
    except Exception as error:
        if _own_error(error) is None and not isinstance(error, (RayError, ExecutionTimeoutError)):
            raise
        raise _as_own(error) from None


def _as_own(error: BaseException) -> DA3Error:
    """The error of this product that another one carries; or its cause in a sentence, without advice."""
    from ray.exceptions import RayError

    if (own := _own_error(error)) is not None:
        return own
    cause = next((each for each in _causes(error) if not isinstance(each, RayError)), error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    reason = ": ".join([type(cause).__name__, *lines[:1]]).rstrip(".")
    return DA3Error(f"Ray ended the run: {reason}. Run the same command again to go on.")


def _own_error(error: BaseException) -> DA3Error | None:
    from ray.exceptions import RayError

    # Ray's errors of tasks are of the cause's class too, with a traceback as their text.
    own = (each for each in _causes(error) if not isinstance(each, RayError))
    return next((each for each in own if isinstance(each, DA3Error)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what caused it, from the last one to the first."""
    from ray.exceptions import RayTaskError

    while error is not None:
        yield error
        error = error.cause if isinstance(error, RayTaskError) else error.__cause__ or error.__context__
