//! Statements with their values, and about how many bytes they are on the way: who sends much may take longer.

use std::borrow::Cow;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// Bytes a second that the slowest network carries for which batches are made to wait.
const SLOWEST: u64 = 128 << 10;

/// What a number, a stamp or the length of a text takes at most.
const FIXED: usize = 12;

/// A value that knows about how many bytes it is when it is sent.
pub(super) trait Weighs {
    fn weight(&self) -> usize;
}

impl Weighs for str {
    fn weight(&self) -> usize {
        self.len().saturating_add(FIXED)
    }
}

impl Weighs for String {
    fn weight(&self) -> usize {
        self.as_str().weight()
    }
}

impl Weighs for Cow<'_, str> {
    fn weight(&self) -> usize {
        (**self).weight()
    }
}

impl<T: Weighs + ?Sized> Weighs for &T {
    fn weight(&self) -> usize {
        (**self).weight()
    }
}

impl<T: Weighs> Weighs for Option<T> {
    fn weight(&self) -> usize {
        self.as_ref().map_or(FIXED, Weighs::weight)
    }
}

impl<T: Weighs> Weighs for Vec<T> {
    fn weight(&self) -> usize {
        self.iter().map(Weighs::weight).fold(FIXED, usize::saturating_add)
    }
}

impl Weighs for u8 {
    fn weight(&self) -> usize {
        1
    }
}

macro_rules! fixed {
    ($($kind:ty),+) => { $(impl Weighs for $kind {
        fn weight(&self) -> usize {
            FIXED
        }
    })+ };
}
fixed!(i32, i64, f64, DateTime<Utc>, Uuid);

/// What can be a value of a statement.
pub(super) trait Value: ToSql + Weighs + Sync + Send {}

impl<T: ToSql + Weighs + Sync + Send> Value for T {}

/// A value for a statement.
pub(super) type Param<'a> = Box<dyn Value + 'a>;

/// A statement with its values.
pub(super) struct Sql<'a> {
    /// What it is about, for errors.
    pub(super) place: &'static str,
    pub(super) text: &'static str,
    pub(super) params: Vec<Param<'a>>,
}

impl<'a> Sql<'a> {
    pub(super) fn new(place: &'static str, text: &'static str, params: Vec<Param<'a>>) -> Self {
        Self { place, text, params }
    }

    pub(super) fn plain(text: &'static str) -> Self {
        Self::new("the transaction", text, Vec::new())
    }
}

/// About how many bytes statements are on the way.
pub(super) fn weight(statements: &[Sql<'_>]) -> usize {
    statements.iter().flat_map(|sql| &sql.params).map(|param| param.weight()).fold(0, usize::saturating_add)
}

/// How long so many bytes may be on the way, beside what anything may take.
pub(super) fn on_the_way(bytes: usize) -> Duration {
    Duration::from_millis(u64::try_from(bytes).unwrap_or(u64::MAX).saturating_mul(1_000) / SLOWEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_long_weighs_much() {
        let text = "x".repeat(1 << 20);
        let light = || Sql::new("", "", vec![Box::new(7_i64), Box::new(vec!["r"; 3])]);
        let heavy = Sql::new("", "", vec![Box::new(vec![None, Some(Cow::Borrowed(text.as_str()))])]);
        assert!(weight(&[light(), light()]) < 200);
        let bytes = weight(&[light(), heavy]);
        assert!((1 << 20..(1 << 20) + 200).contains(&bytes), "{bytes}");
        assert_eq!(on_the_way(bytes).as_secs(), 8);
        assert!(on_the_way(usize::MAX) > Duration::from_secs(3600));
    }
}
