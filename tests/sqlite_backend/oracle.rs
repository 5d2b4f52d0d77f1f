//! Random batches on the database and on the ledger: the same answers, the same state.

use super::steps::{agree, steps};
use super::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn it_decides_and_stores_as_the_ledger_does(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            agree(&open(&db(dir.path())).await, steps, 0).await
        })?;
    }
}
