"""Bodies of requests: the union of what rerank dialects send. What a field does: `fastrerank.serve.api.fields`.

A field that is null counts as not sent. Unknown names are kept, so that they can be reported as ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, StrictBool, StrictInt, StrictStr, model_validator

__all__ = ["Common", "RerankBody", "ScoreBody"]

Text = StrictStr | dict[str, Any]
# Without fail_fast a long list of wrong values would give one error for each element.
Texts = Annotated[list[Text], Field(fail_fast=True)]
Strings = Annotated[list[StrictStr], Field(fail_fast=True)]
Count = Annotated[StrictInt, Field(ge=0)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]


class Common(BaseModel):
    """Fields of all routes: the model, how texts are cut, what the prompt says, and which score is returned."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr | None = Field(None, description="One of /v1/models; the first of them where it is missing.")
    label: StrictStr | StrictInt | None = Field(
        None, description="The label that ranks where the head has several, by name or number."
    )
    instruction: StrictStr | None = Field(None, description="In place of the prompt's instruction.")
    instruct: StrictStr | None = Field(None, description="SGLang's `instruction`.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="vLLM's: `instruction` and `instruct` in it are read, other keys are refused."
    )
    max_tokens_per_doc: Count | None = Field(None, description="Tokens of a document's own text; 0: no limit.")
    max_doc_length: Count | None = Field(None, description="Jina's `max_tokens_per_doc`.")
    max_tokens_per_query: Count | None = Field(None, description="Tokens of the query's own text; 0: no limit.")
    max_query_length: Count | None = Field(None, description="Jina's `max_tokens_per_query`.")
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=-1)] | None = Field(
        None, description="Tokens of query and document together, up to the model's limit; -1: the model's limit."
    )
    truncation_side: Literal["left", "right"] | None = Field(None, description="The end at which a document is cut.")
    truncation_direction: Literal["left", "Left", "right", "Right"] | None = Field(
        None, description="TEI's `truncation_side`."
    )
    truncate: StrictBool | Literal["NONE", "END"] | None = Field(
        None, description="TEI's and NVIDIA's: false or \"NONE\" refuses texts that would be cut."
    )
    truncation: StrictBool | None = Field(None, description="Voyage's `truncate`.")
    max_chunks_per_doc: StrictInt | None = Field(None, description="Refused: documents are not split into chunks.")
    priority: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="Accepted without effect: requests are served in their order."
    )
    relevant_spans: dict[str, Any] | None = Field(None, description='Refused, unless its `mode` is "disabled".')
    return_embeddings: StrictBool | None = Field(None, description="true is refused.")
    threshold: Number | None = Field(None, description="Refused: `score_threshold` drops results by their score.")
    raw_scores: StrictBool | None = Field(None, description="Logits instead of probabilities.")
    raw: StrictBool | None = Field(None, description="Same as `raw_scores`.")
    use_activation: StrictBool | None = Field(None, description="vLLM's: false is `raw_scores`.")


class RerankBody(Common):
    """A query and its candidates: `texts` as Text Embeddings Inference names them, `documents` as all others do."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "how long do fleas live", "documents": ["A year.", "In fur."]}]}
    )

    query: Text
    texts: Strings | None = Field(None, description="Candidates, in the dialect of TEI: the answer is a bare array.")
    documents: Texts | Text | None = Field(
        None, description="Candidates: strings, or objects with a `text`; one alone where vLLM's dialect takes it."
    )
    top_n: Count | None = Field(None, description="How many results; all where it is missing.")
    top_k: Count | None = Field(None, description="Voyage's `top_n`.")
    topN: StrictInt | None = Field(None, description="Google's `top_n`; 0 and less: all.")
    score_threshold: Number | None = Field(None, description="Drops results whose returned score is lower.")
    min_score: Number | None = Field(None, description="Same as `score_threshold`.")
    return_documents: StrictBool | None = Field(None, description="Whether results carry their documents.")
    return_text: StrictBool | None = Field(None, description="TEI's `return_documents`.")
    explain: StrictBool | None = Field(
        None,
        description="Whether results carry `tokens`, [[text, what it gets], ...]; for methods that read attention.",
    )
    rank_fields: Annotated[Strings, Field(min_length=1)] | None = Field(
        None, description="Fields of document objects that make up their text."
    )

    @model_validator(mode="after")
    def _one_list(self) -> RerankBody:
        if (self.texts is None) == (self.documents is None):
            raise ValueError("the body needs either `documents` or `texts`")
        return self


class ScoreBody(Common):
    """Pairs to score, one to one, one to many or many to many, under vLLM's four names for the two sides."""

    queries: Text | Texts | None = None
    documents: Text | Texts | None = None
    items: Text | Texts | None = None
    text_1: Text | Texts | None = None
    text_2: Text | Texts | None = None
    data_1: Text | Texts | None = None
    data_2: Text | Texts | None = None
