"""Bodies of requests: the union of what rerank dialects send. Unknown fields are ignored, as theirs are."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

__all__ = ["RerankBody", "ScoreBody"]

Text = StrictStr | dict[str, Any]
Count = Annotated[StrictInt, Field(ge=0)]


class RerankBody(BaseModel):
    """A query and its candidates: `texts` as Text Embeddings Inference names them, `documents` as all others do."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "how long do fleas live", "documents": ["A year.", "In fur."]}]}
    )

    query: Text
    texts: list[StrictStr] | None = Field(
        None, description="Candidates, in the dialect of TEI: the answer is a bare array."
    )
    documents: list[Text] | None = Field(None, description="Candidates: strings, or objects with a `text`.")
    model: StrictStr | None = Field(None, description="One of /v1/models; the first of them where it is missing.")
    top_n: Count | None = Field(None, description="How many results; all where it is missing.")
    return_documents: StrictBool | None = Field(None, description="Whether results carry their documents.")
    return_text: StrictBool = Field(False, description="TEI's `return_documents`.")
    raw_scores: StrictBool = Field(False, description="Logits instead of probabilities.")
    use_activation: StrictBool | None = Field(None, description="vLLM's: false is `raw_scores`.")
    explain: StrictBool = Field(
        False,
        description="Whether results carry `tokens`, [[text, what it gets], ...]; for methods that read attention.",
    )
    rank_fields: list[StrictStr] | None = Field(None, description="Fields of document objects that make up their text.")

    @model_validator(mode="after")
    def _one_list(self) -> RerankBody:
        if (self.texts is None) == (self.documents is None):
            raise ValueError("the body needs either `documents` or `texts`")
        return self


class ScoreBody(BaseModel):
    """Pairs to score, one to one, one to many or many to many, under vLLM's four names for the two sides."""

    model: StrictStr | None = None
    queries: Text | list[Text] | None = None
    documents: Text | list[Text] | None = None
    items: Text | list[Text] | None = None
    text_1: Text | list[Text] | None = None
    text_2: Text | list[Text] | None = None
    data_1: Text | list[Text] | None = None
    data_2: Text | list[Text] | None = None
    use_activation: StrictBool | None = None
    raw_scores: StrictBool = False
