//! A decision that may also fail: storage's result outside, the decision inside.

use super::StoreError;
use crate::model::Refusal;

pub(super) type Verdict<T> = Result<Result<T, Refusal>, StoreError>;

/// The two results of a decision in one step: a refusal leaves the function as `Ok(Err(..))`.
macro_rules! verdict {
    ($decided:expr) => {
        match $decided? {
            Ok(value) => value,
            Err(refusal) => return Ok(Err(refusal)),
        }
    };
}
pub(super) use verdict;
