//! What is told of a move into the place that the settings name already: that is the state in use, and what would move is what was left behind. What is
//! right of two old copies (move one aside, delete runs) would do harm there.

use super::migrate::{NAMED, Plan, named};
use super::shown::counted;
use super::{Move, Origin, ProjectError, ProjectErrorKind, Settings, Source};
use crate::model::RunId;

/// A move as its messages name it.
#[derive(Debug, Clone)]
pub(super) struct Told {
    /// What says that the target is in use; `None` if nothing does.
    in_use: Option<String>,
    source: String,
    target: String,
    /// What the source is where the target is in use.
    source_is: &'static str,
    /// The first runs that move.
    moving: Vec<RunId>,
    /// What is known of the target where an earlier move into it was cut off.
    part: Option<String>,
}

impl Told {
    pub(super) fn new(settings: &Settings, what: &Move, source: String, target: String) -> Self {
        let to = what.to;
        let in_use = (settings.backend.value == to.name()).then(|| match &settings.backend.source {
            Source::Default => format!("state_backend is {} by default", to.name()),
            source => format!("{source} says state_backend: {} already", to.name()),
        });
        let source_is = if let Origin::Home(_) = what.from { "is what was left behind" } else { "is another one" };
        Self { in_use, source, target, source_is, moving: Vec::new(), part: None }
    }

    /// Whether the settings in force name the target.
    pub(super) fn is_in_use(&self) -> bool {
        self.in_use.is_some()
    }

    /// Remembers a run that would move.
    pub(super) fn moves(&mut self, run: &RunId) {
        if self.moving.len() < NAMED {
            self.moving.push(run.clone());
        }
    }

    /// Takes what is told of a target into which a move was cut off, if one was.
    pub(super) fn set_part(&mut self, told: Option<String>) {
        self.part = told;
    }

    /// The same, for who asks.
    pub(super) fn part(&self) -> Option<&str> {
        self.part.as_deref()
    }

    /// Which of the two is which.
    fn left_behind(&self) -> Option<String> {
        let Self { source, target, source_is, .. } = self;
        Some(format!("{}: {target} is the state in use, and {source} {source_is}", self.in_use.as_ref()?))
    }

    /// As [`Plan::refuse_conflicts`].
    pub(super) fn refuse_conflicts(&self, plan: &Plan) -> Result<(), ProjectError> {
        let refused = self.refuse_differing(plan);
        // Whatever is done about the runs, nobody opens the target as long as it counts as a part.
        refused.map_err(|error| match &self.part {
            Some(part) => error.and(format_args!(". {part}")),
            None => error,
        })
    }

    fn refuse_differing(&self, plan: &Plan) -> Result<(), ProjectError> {
        let Some(left_behind) = self.left_behind().filter(|_| plan.differing_runs > 0) else {
            return plan.refuse_conflicts(&self.target);
        };
        let names = named(&plan.differing, plan.differing_runs);
        Err(ProjectError::new(
            ProjectErrorKind::Conflict,
            format!(
                "{left_behind}. They hold other content for: {names}; nothing was changed. If work went on in {target}, there is nothing to move: leave {source} \
                 where it is, or set it aside. If {source} is the right one, let the settings name it again",
                target = self.target,
                source = self.source,
            ),
        ))
    }

    /// What an operator should know of the runs on both sides. `there`: the target had a state before.
    pub(super) fn notices(&self, plan: &Plan, there: bool) -> Vec<String> {
        let Self { source, target, .. } = self;
        let Some(left_behind) = self.left_behind().filter(|_| there) else {
            return plan.replaces(target).into_iter().chain(plan.only_there(target)).collect();
        };
        let mut notices = vec![left_behind];
        if plan.only_in_target > 0 {
            let names = named(&plan.only_in_target_runs, plan.only_in_target);
            notices.push(format!(
                "{target} also holds runs that {source} has not: {names}; work went on there, and they stay as they are"
            ));
        }
        if plan.moves.runs > 0 {
            notices.push(format!(
                "{source} holds {} that {target} lacks: {}; this move brings them there, also those that were deleted there since (`seeknal state cleanup`)",
                counted(plan.moves.runs, "run"),
                named(&self.moving, plan.moves.runs)
            ));
        }
        notices
    }
}
