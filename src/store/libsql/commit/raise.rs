//! Raises all numbers of a server whose older state was brought back.

use crate::store::libsql::hrana::Stmt;
use crate::store::libsql::lease::now_ms;

/// Where numbers go on whose highest that is known is this: at the microseconds since 1970, by the server's clock. Numbers are not given out as fast as these
/// go by, so that all that others have given out lie before, and whoever brings the same state back once more goes on behind what was given out in between.
/// Where the clock does not tell (a number is ahead of it) they go on so far behind what is known: further than others have counted meanwhile.
macro_rules! behind {
    ($known:expr) => {
        concat!(
            "max(",
            $known,
            ", min(4611686018427387904, CASE WHEN ",
            $known,
            " < 1000 * ",
            now_ms!(),
            " THEN 1000 * ",
            now_ms!(),
            " ELSE ",
            $known,
            " + 1000000000 END))"
        )
    };
}

/// Raises commit sequence, tokens and the versions of all runs beyond the highest that were heard of. Everybody reads all runs anew, as where one of their nodes
/// was deleted.
pub(super) fn raise(seq: u64, token: u64) -> [Stmt; 2] {
    [
        // Where somebody else was faster the sequence is higher by now, and nothing changes.
        Stmt::exec(
            concat!(
                "UPDATE meta SET seq = ",
                behind!("?1"),
                ", token = ",
                behind!("max(token, ?2)"),
                " WHERE id = 1 AND seq < ?1"
            ),
            vec![seq.into(), token.into()],
        ),
        Stmt::exec(
            "UPDATE runs SET version = m.seq, header_version = m.seq, nodes_deleted_version = m.seq \
             FROM (SELECT seq FROM meta WHERE id = 1) AS m WHERE changes() = 1 AND runs.version < m.seq",
            Vec::new(),
        ),
    ]
}
