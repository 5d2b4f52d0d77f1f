//! The persistence actor: tells the outcomes of whole batches, in their order, while the next one is being flushed; and waits out the pauses of what
//! is unknown.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::queue::Sink;
use super::shard::{News, Pausing, Shard, Untold};

pub(super) enum Msg<S: Sink> {
    Tell(News<S>, Untold<S>),
    RetryAfter(Duration, Pausing<S>),
}

pub(super) struct PersistActor<S>(PhantomData<fn() -> S>);

impl<S> PersistActor<S> {
    pub(super) fn new() -> Self {
        Self(PhantomData)
    }
}

#[cfg_attr(seeknal_ractor_async_trait, ractor::async_trait)]
impl<S: Sink> Actor for PersistActor<S> {
    type Msg = Msg<S>;
    type State = Arc<Shard<S>>;
    type Arguments = Arc<Shard<S>>;

    async fn pre_start(&self, _: ActorRef<Msg<S>>, shard: Arc<Shard<S>>) -> Result<Arc<Shard<S>>, ActorProcessingErr> {
        Ok(shard)
    }

    async fn handle(&self, _: ActorRef<Msg<S>>, message: Msg<S>, _: &mut Arc<Shard<S>>) -> Result<(), ActorProcessingErr> {
        match message {
            Msg::Tell(news, untold) => {
                news.tell();
                drop(untold);
            }
            Msg::RetryAfter(pause, pausing) => {
                drop(tokio::spawn(async move {
                    tokio::time::sleep(pause).await;
                    pausing.over();
                }));
            }
        }
        Ok(())
    }
}
