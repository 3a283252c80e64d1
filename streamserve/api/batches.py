"""OpenAI's Batches API: the lines of an uploaded file asked while others have no need of the engine, the answers as files.

Owns these routes. What a batch is stands in batch_schema.py, how it is run in batch_runner.py.
"""

from streamserve.api.batch_runner import BatchRunner
from streamserve.api.batch_schema import Batch, BatchList, CreateBatch, read_create
from streamserve.api.query import page_of, query_of
from streamserve.api.routes import RouteSpec
from streamserve.api.schema import load_object, show
from streamserve.api.service import Service
from streamserve.api.uploads import Uploads
from streamserve.api.wire import Exchange
from streamserve.errors import InvalidRequest, NotFound

MAX_LISTED, LISTED = 100, 20


class Batches:
    """These routes."""

    def __init__(self, service: Service, uploads: Uploads, runner: BatchRunner) -> None:
        self._service = service
        self._uploads = uploads
        self._runner = runner

    def routes(self) -> list[RouteSpec]:
        """What there is here."""
        path, one = "/v1/batches", "/v1/batches/{id}"
        query = (("limit", f"1 to {MAX_LISTED}; {LISTED} when left out"), ("after", "only batches behind this one"))
        return [
            RouteSpec("POST", path, self.create, CreateBatch, Batch, errors=(413, 429)),
            RouteSpec("GET", path, self.list, result=BatchList, query=query),
            RouteSpec("GET", one, self.retrieve, result=Batch),
            RouteSpec("POST", f"{one}/cancel", self.cancel, result=Batch, errors=(409,)),
        ]

    async def create(self, exchange: Exchange) -> None:
        """POST /v1/batches: answer the requests of a file that was uploaded for this, with purpose batch."""
        request = read_create(load_object(await exchange.body(self._service.max_body_bytes)))
        owner = self._service.owner_of(exchange.scope)
        kept = self._uploads.get(request.input_file_id, owner)
        if kept is None or kept.purpose != "batch":
            what = "is no file that is kept" if kept is None else f"was uploaded for {kept.purpose}"
            raise InvalidRequest(
                f"input_file_id is {show(request.input_file_id)}, which {what}; upload one with purpose batch",
                param="input_file_id",
            )
        await exchange.answer_json((await self._runner.create(request, kept.data, owner)).shown())

    async def list(self, exchange: Exchange) -> None:
        """GET /v1/batches: the batches that are kept, newest first."""
        query = query_of(exchange, "limit", "after")
        shown = [batch.shown() for batch in self._runner.listed(self._service.owner_of(exchange.scope))]
        await exchange.answer_json(page_of(query, shown, MAX_LISTED, LISTED, "batch that is listed"))

    async def retrieve(self, exchange: Exchange) -> None:
        """GET /v1/batches/{id}: how far a batch is."""
        await exchange.answer_json(self._found(exchange).shown())

    async def cancel(self, exchange: Exchange) -> None:
        """POST /v1/batches/{id}/cancel: ask no more of its requests; what is answered stays."""
        await self._runner.cancel(self._found(exchange).id)
        await exchange.answer_json(self._found(exchange).shown())

    def _found(self, exchange: Exchange) -> Batch:
        id = exchange.scope["path_params"]["id"]
        batch = self._runner.get(id, self._service.owner_of(exchange.scope))
        if batch is None:
            raise NotFound(f"there is no batch {show(id)}, or no longer; GET /v1/batches lists what there is", param="id")
        return batch
