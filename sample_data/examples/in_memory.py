"""Add answers to the rows of a DataFrame, without files and without Prefect.

From the root of the repository:

    python sample_data/examples/in_memory.py
"""

import pandas as pd

from glmbatch import annotate_table
from glmbatch.settings.job import ClassifyStep

reviews = pd.read_parquet("sample_data/reviews/day=2026-11-02/part-0.parquet").head(40)

# Run a job file over rows in memory. The answers equal those in sample_data/out.
answered = annotate_table(reviews, "sample_data/reviews.yaml")
print(answered[["product", "sentiment", "sentiment_score", "reply"]].head())
print(answered["sentiment"].value_counts())

# Or define steps here. With `cache="some/folder"`, later calls ask the model only about new rows.
mood = ClassifyStep(name="mood", labels=["positive", "neutral", "negative"])
answered = annotate_table(reviews, {"model": "sample_data/tiny-chatglm2", "steps": [mood]})
print(answered[["text", "mood", "mood_error"]].tail(3))
