"""Fine-tuning: data, the step that trains, and the loop around it. See loop.py for how."""
