"""What looks after ranks while they train: heartbeats, progress, hangs, stragglers. Travels; standard library only."""
