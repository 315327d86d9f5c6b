"""A server that streams completions as OpenAI's API does: a token a chunk, at a fixed pace.

It is what a peer is to `gllm-ray bench compare`: a process of its own that knows nothing of us.
`python sse_server.py PORT SECONDS_A_TOKEN [FAILING_EVERY]`
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    token_s = 0.0
    failing_every = 0
    num_requests = 0

    def do_GET(self):
        self._answer(200, {"data": [{"id": "recital"}]})

    def do_POST(self):
        Handler.num_requests += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] != "recital" or not body["stream"]:
            self._answer(404, {"error": {"message": f"no stream of {body['model']}"}})
        elif self.failing_every and Handler.num_requests % self.failing_every == 0:
            self._answer(503, {"error": {"message": "busy"}})
        else:
            self._stream(len(body["prompt"]), body["max_tokens"])

    def _stream(self, num_prompt_tokens, num_tokens):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for index in range(num_tokens):
            time.sleep(self.token_s)
            reason = "length" if index + 1 == num_tokens else None
            self._event({"choices": [{"text": "x", "finish_reason": reason}], "usage": None})
        usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_tokens}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data):
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _answer(self, status, data):
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    port, Handler.token_s = int(sys.argv[1]), float(sys.argv[2])
    if len(sys.argv) > 3:
        Handler.failing_every = int(sys.argv[3])
    ThreadingHTTPServer.request_queue_size = 64
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
