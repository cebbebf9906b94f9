"""What a model can call and what runs then: functions, Python, a browser. Knows messages; knows no model, no loop."""
