"""Start-up of multi-process runs."""

import os
import sys
import threading

import jax

TIMEOUT = 300  # seconds
_MARGIN = 60  # seconds by which jax's own timeout is later, because jax aborts the process without this message


def start_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = TIMEOUT,
) -> int:
    """Join this process to the run and return its index (0 in a single-process run).

    Call it before any use of a device. It does nothing unless the arguments or the environment define several
    processes. Arguments that are None are read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and
    otherwise detected by jax under Slurm, Open MPI and on TPU pods.

    If the other processes do not join in time, it prints an error and exits with code 2, because jax would abort the
    process without an exception.

    Args:
        coordinator: "host:port" of process 0.
        processes: number of processes.
        process: index of this process.
        timeout: seconds to wait for the other processes.

    Raises:
        RuntimeError: joining failed for any other reason.
        ValueError: the settings contradict each other.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _integer_variable("JAX_NUM_PROCESSES") if processes is None else processes
    process = _integer_variable("JAX_PROCESS_ID") if process is None else process
    if processes == 1 or not (coordinator or processes or _cluster_size() > 1):
        return 0
    if jax.distributed.is_initialized():
        return jax.process_index()
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"process index {process} of {processes} processes: the indices are 0 to {processes - 1}")
    message = (
        f"process {'?' if process is None else process} of {processes or _cluster_size()} could not join the run at "
        f"{coordinator or 'the detected coordinator'} within {timeout} s ({{reason}}): start the same command on every "
        "host, with JAX_COORDINATOR_ADDRESS=host0:port, JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=0 ... N-1 in the "
        "environment, or through srun, mpirun or the pod's `--worker=all`"
    )
    timer = threading.Timer(timeout, _exit, [message.format(reason="the other processes did not join")])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout + _MARGIN)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(message.format(reason=reason)) from error
    finally:
        timer.cancel()
    return jax.process_index()


def _exit(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(2)


def _integer_variable(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise ValueError(f"environment variable {name} is {text!r}; expected a non-negative integer")
    return int(text)


def _cluster_size() -> int:
    """Number of processes according to the launcher's environment variables; 1 without a launcher."""
    sizes = [os.environ.get(name, "") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    hosts = [os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1]
    return max([int(size) for size in sizes if size.isdigit()] + hosts)
