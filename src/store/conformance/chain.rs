//! Entries as a run actor makes them: each one stands on what the one before it will have made.

use crate::model::{Entry, Guard, Mutation, Refusal, RunId, RunPart, RunState, Version, apply_all};

/// The entries of one run that are in flight. Its base is the committed state it began with; its tip is that state plus every entry it made,
/// at the versions that they will get if nobody else writes. The version of a new run is the backend's to give: run actors send nothing behind
/// an entry that makes or deletes a run before it is answered.
///
/// ```
/// use seeknal_state::model::{Mutation, NewRun, RunId};
/// use seeknal_state::store::conformance::Chain;
///
/// let mut chain = Chain::of_new(RunId::new("run_1")?);
/// let at = seeknal_state::model::time::parse("2024-01-10T12:00:00Z")?;
/// let entry = chain.entry(vec![Mutation::Create { run: NewRun::running(), at }])?;
/// assert_eq!(entry.parts.len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Chain {
    run: RunId,
    base: Version,
    tip: Option<RunState>,
}

impl Chain {
    /// The chain of a run that is not there.
    pub fn of_new(run: RunId) -> Self {
        Self { run, base: Version::NONE, tip: None }
    }

    /// A chain that stands on a committed state.
    pub fn on(committed: &RunState) -> Self {
        Self { run: committed.id().clone(), base: committed.version(), tip: Some(committed.clone()) }
    }

    /// The state after all entries so far, as far as it can be known.
    pub fn tip(&self) -> Option<&RunState> {
        self.tip.as_ref()
    }

    /// The committed version that it stands on.
    pub fn base(&self) -> Version {
        self.base
    }

    /// The version of the tip.
    pub fn expect(&self) -> Version {
        self.tip.as_ref().map_or(Version::NONE, RunState::version)
    }

    /// The next part: moves the tip.
    ///
    /// # Errors
    /// [`Refusal`] if the mutations do not fit the tip; then the chain is as it was. Guards are not looked at: the backend is to decide them.
    pub fn part(&mut self, guards: Vec<Guard>, mutations: Vec<Mutation>) -> Result<RunPart, Refusal> {
        let expect = self.expect();
        apply_all(&mut self.tip, &self.run, &mutations, expect.next())?;
        Ok(RunPart { run: self.run.clone(), base: self.base, expect, guards, mutations, after: self.tip.clone() })
    }

    /// The next entry, without guards.
    ///
    /// # Errors
    /// As [`part`](Self::part).
    pub fn entry(&mut self, mutations: Vec<Mutation>) -> Result<Entry, Refusal> {
        self.guarded(Vec::new(), mutations)
    }

    /// The next entry.
    ///
    /// # Errors
    /// As [`part`](Self::part).
    pub fn guarded(&mut self, guards: Vec<Guard>, mutations: Vec<Mutation>) -> Result<Entry, Refusal> {
        Ok(Entry { parts: vec![self.part(guards, mutations)?], ..Entry::default() })
    }

    /// A part that the tip would refuse, to see that the backend refuses it too: the chain stays as it is.
    pub fn unchecked(&self, guards: Vec<Guard>, mutations: Vec<Mutation>) -> RunPart {
        RunPart { run: self.run.clone(), base: self.base, expect: self.expect(), guards, mutations, after: self.tip.clone() }
    }
}
