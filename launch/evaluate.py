"""Perplexity on an expert x tensor parallel grid.

deepspeed launch/evaluate.py MODEL --ep 4 --tp 2 (--text F | --token-ids F.json)
"""

from resmoe_dist.launch.evaluate import main

if __name__ == "__main__":
    main()
