"""What answers are worth: text metrics, exams, safety, statistics, comparisons."""
