"""Answers next to the rows of a DataFrame, without files and without Prefect. From the root:

python sample_data/examples/in_memory.py
"""

import pandas as pd

from glmbatch import annotate_table
from glmbatch.settings.job import ClassifyStep

reviews = pd.read_parquet("sample_data/reviews/day=2026-11-02/part-0.parquet").head(40)

# The job of a file, over the rows in memory: the same answers as in sample_data/out.
answered = annotate_table(reviews, "sample_data/reviews.yaml")
print(answered[["product", "sentiment", "sentiment_score", "reply"]].head())
print(answered["sentiment"].value_counts())

# Or steps written here. With `cache="some/folder"` a later call asks the model only about new rows.
mood = ClassifyStep(name="mood", labels=["positive", "neutral", "negative"])
answered = annotate_table(reviews, {"model": "sample_data/tiny-chatglm2", "steps": [mood]})
print(answered[["text", "mood", "mood_error"]].tail(3))
