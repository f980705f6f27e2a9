"""The links of the chain that `gate` walks: what a bundle that is to be deployed is held to, one by one."""
