"""Generate text on an expert x tensor parallel grid.

deepspeed launch/infer.py --ep 4 --tp 2 [--model DIR] [--prompt TEXT …]
"""

from resmoe_dist.launch.infer import main

if __name__ == "__main__":
    main()
