"""What this machine has and what an experiment needs of it: hardware, hubs, cost, preflight checks, doctor."""
