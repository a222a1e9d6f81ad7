"""Starting the processes of a pod or a cluster, with an error that says what to run."""

import os
import sys
import threading

import jax

TIMEOUT = 300  # seconds
_MARGIN = 60  # seconds that jax waits longer than we do, so that our sentence comes before its abort


def start_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = TIMEOUT,
) -> int:
    """Join this process to the others of the same run, and return its index (0 when it is alone).

    Call it before anything touches a device. It does nothing when neither the arguments nor the environment speak of
    several processes: a laptop, one machine with several accelerators, a single TPU host.

    coordinator: "host:port" of process 0; processes: how many there are; process: the index of this one. What is not
    given is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and otherwise found by jax under
    Slurm, Open MPI and on TPU pods. timeout: seconds to wait for the others.

    When the others do not come in time, it prints what to run and ends this process with exit code 2, because jax would
    abort it and leave nothing to catch. Raises RuntimeError, with the same words, for every other failure to join;
    ValueError when the settings contradict each other.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    process = _number("JAX_PROCESS_ID") if process is None else process
    if processes == 1 or not (coordinator or processes or _cluster_size() > 1):
        return 0
    if jax.distributed.is_initialized():
        return jax.process_index()
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"process index {process} of {processes} processes: the indices are 0 to {processes - 1}")
    failure = (
        f"process {'?' if process is None else process} of {processes or _cluster_size()} could not join the run at "
        f"{coordinator or 'the detected coordinator'} within {timeout} s ({{reason}}): start the same command on every "
        "host, with JAX_COORDINATOR_ADDRESS=host0:port, JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=0 ... N-1 in the "
        "environment, or through srun, mpirun or the pod's `--worker=all`"
    )
    waiting = threading.Timer(timeout, _give_up, [failure.format(reason="the others did not come")])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout + _MARGIN)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(failure.format(reason=reason)) from error
    finally:
        waiting.cancel()
    return jax.process_index()


def _give_up(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
    os._exit(2)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdigit():
        raise ValueError(f"environment variable {variable} is {text!r}; it must be a whole number")
    return int(text)


def _cluster_size() -> int:
    """How many processes the launcher of this process started, as far as its environment tells."""
    sizes = [os.environ.get(name, "") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    hosts = [os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1]
    return max([int(size) for size in sizes if size.isdigit()] + hosts)
