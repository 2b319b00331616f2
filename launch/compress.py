"""`resmoe-dist compress` spread over ranks.

mpirun -n 4 python launch/compress.py SOURCE OUTPUT --ep 4
"""

from resmoe_dist.parallel.entry_point import run_entry_point


def main() -> int | None:
    """One rank; the others watch it from here on, while the heavy libraries load."""
    from resmoe_dist.launch.compress import run

    return run()


if __name__ == "__main__":
    run_entry_point(main)
