"""Several processes: matrices that are sharded over them (FSDP2), and refreshes that are shared out (DDP)."""
