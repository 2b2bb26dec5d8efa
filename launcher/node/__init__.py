"""What runs on the nodes: standard library only, copied beside the job, imports nothing from here."""
