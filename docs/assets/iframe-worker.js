// Search without a server. Browsers start no workers for pages opened from a file; there
// a hidden frame takes the worker's place, which is all that the search needs.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      this.inner = frame.contentWindow;
      this.inner.postMessage = (data) =>
        this.dispatchEvent(new MessageEvent("message", { data }));
      const script = this.inner.document.createElement("script");
      script.src = new URL(url, document.baseURI).href;
      this.ready = new Promise((resolve) => (script.onload = resolve));
      this.inner.document.body.appendChild(script);
    }

    postMessage(data) {
      const event = () => new this.inner.MessageEvent("message", { data });
      this.ready.then(() => this.inner.dispatchEvent(event()));
    }

    terminate() {
      this.inner.frameElement.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
