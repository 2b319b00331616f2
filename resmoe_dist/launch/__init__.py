"""What the launch scripts do, so that an installed package can do it too:

python -m resmoe_dist.launch.infer …, deepspeed --module resmoe_dist.launch.infer …
"""
