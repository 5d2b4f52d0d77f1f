//! Random batches on the server and on the ledger: the same answers but for the gaps in the sequence, the same state.

use super::steps::{agree, steps};
use super::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn it_decides_and_stores_as_the_ledger_does(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let Some(store) = Store::fresh() else { return Ok(()) };
            agree(&store.open().await, steps, 2).await
        })?;
    }
}
