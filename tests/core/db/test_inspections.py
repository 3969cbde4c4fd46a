"""A dry run's questions: taken once, answered once, asked again when whoever took them died."""

from __future__ import annotations

from sqlalchemy import text

from core.db import inspections


async def ask(site, queue="default"):
    return await site.does(
        inspections.ask,
        project_id=site.project_id,
        queue=queue,
        spec={"seed": 1},
        training_file_id=site.file_id,
        validation_file_id=None,
    )


async def take(site, *queues, within_s=30.0):
    return await site.does(inspections.take, queues or ["default"], within_s)


async def older(site, column, seconds):
    async with site.db.begin() as session:
        await session.execute(
            text(f"update inspections set {column} = {column} - interval '{seconds} s'")
        )


async def test_the_oldest_question_is_taken_once_and_answered_once(site):
    first, second = await ask(site), await ask(site)
    question = await take(site)
    assert (question.id, question.spec, question.validation_key) == (first, {"seed": 1}, None)
    assert question.training_key
    assert (await take(site)).id == second
    assert await take(site) is None
    assert await site.does(inspections.read, first) is None
    await site.does(inspections.answer, first, {"problems": []})
    await site.does(inspections.answer, first, {"problems": ["late"]})
    assert await site.does(inspections.read, first) == {"problems": []}


async def test_only_questions_of_the_own_queues_are_taken(site):
    await ask(site, queue="large")
    assert await take(site, "default") is None
    assert (await take(site, "default", "large")) is not None


async def test_a_question_whose_taker_fell_silent_is_taken_again(site):
    question = await ask(site)
    await take(site)
    await older(site, "taken_at", inspections.TAKEN_FOR_S + 1)
    assert (await take(site, within_s=600)).id == question


async def test_nobody_takes_what_nobody_waits_for_and_it_is_forgotten(site):
    await ask(site)
    await older(site, "asked_at", 31)
    assert await take(site) is None
    assert await site.does(inspections.forget) == 0
    await older(site, "asked_at", inspections.KEPT_S)
    assert await site.does(inspections.forget) == 1
