"""`resmoe-dist compress` spread over ranks.

mpirun -n 4 python launch/compress.py SOURCE OUTPUT --ep 4
"""

from resmoe_dist.launch.compress import main

if __name__ == "__main__":
    main()
