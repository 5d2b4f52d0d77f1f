//! Pauses by the clock of a runtime that need not be that of who waits, who may have none.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::AbortHandle;

/// A task that ends with who waits for it.
struct Ends(AbortHandle);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// `false`, at once: the runtime has ended.
pub(crate) async fn pause_on(runtime: &Handle, pause: Duration) -> bool {
    let sleeping = runtime.spawn(async move { tokio::time::sleep(pause).await });
    let _with_its_waiter = Ends(sleeping.abort_handle());
    sleeping.await.is_ok()
}
