"""Perplexity on an expert x tensor parallel grid.

deepspeed launch/evaluate.py MODEL --ep 4 --tp 2 (--text F | --token-ids F.json)
"""

from resmoe_dist.parallel.entry_point import run_entry_point


def main() -> int | None:
    """One rank; the others watch it from here on, while the heavy libraries load."""
    from resmoe_dist.launch.evaluate import run

    return run()


if __name__ == "__main__":
    run_entry_point(main)
